"""Engines that are made anew, without a worker: what was put on them, and who hears of them."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from celery import Celery
from sqlalchemy import Engine, create_engine, event, text
from support.apps import Isolated
from support.databases import SQLite, new_sqlite
from support.definitions import Refused

from celery_alchemy import Alchemy, WorkerPool


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[SQLite]:
    with new_sqlite(tmp_path / "test.db") as database:
        yield database


@pytest.fixture
def app(sqlite: SQLite) -> Celery:
    app = Isolated("outside", broker="memory://", set_as_current=False)
    app.conf.alchemy_database_url = sqlite.url("")
    return app


def ask(db: Alchemy) -> None:
    with db.unit_of_work() as session:
        session.execute(text("SELECT 1"))


def test_a_listener_put_on_the_engine_follows_when_the_worker_starts(app: Celery, sqlite: SQLite) -> None:
    """Also where the Engine is made anew because the app has one more database by then."""
    db = Alchemy(app)
    early, heard = db.engine, []
    event.listen(early, "checkout", lambda *_: heard.append("checkout"))
    event.listen(early, "before_cursor_execute", lambda *given: heard.append(given[2]))
    early.update_execution_options(early="kept")
    reports = Alchemy(app, database="reports", engine=create_engine(sqlite.url("")))
    db.start_worker(WorkerPool(name="threads", concurrency=2))
    assert db.engine is not early
    event.listen(db.engine, "commit", lambda *_: heard.append("commit"))
    heard.clear()
    ask(db)
    expected = ["checkout", "SELECT 1", "commit"]
    assert [one for one in heard if one in expected] == expected
    assert db.engine.get_execution_options()["early"] == "kept"
    db.start_worker(WorkerPool(name="threads", concurrency=2), "per_process")
    db.stop()
    db.start_worker(WorkerPool(name="threads", concurrency=2), "per_process")
    heard.clear()
    ask(db)
    assert [one for one in heard if one in expected] == expected, "from one Engine to the next"
    for one in (db, reports):
        one.stop()


def test_a_listener_of_on_engine_does_not_follow_beside(app: Celery) -> None:
    """It is put on each Engine by `on_engine`, whenever that was registered; once."""
    app.conf.alchemy_session_strategy = "per_process"
    db, heard = Alchemy(app), []
    early = db.engine
    db.on_engine(lambda engine: event.listen(engine, "commit", lambda *_: heard.append("commit")))
    db.start_worker(WorkerPool(name="threads", concurrency=2))
    assert db.engine is not early
    heard.clear()
    ask(db)
    assert heard == ["commit"]
    db.stop()


def test_an_engine_that_is_replaced_is_none_of_this_process(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    """`on_engine` does not know it any more; who uses it is named, once."""
    app.conf.alchemy_session_strategy = "per_process"
    db, prepared = Alchemy(app), []
    early = db.engine
    db.start_worker(WorkerPool(name="threads", concurrency=2))
    db.on_engine(prepared.append)
    assert prepared == [db.engine]
    for _ in range(2):
        with early.connect() as connection:
            connection.execute(text("SELECT 1"))
    assert caplog.text.count(f"{__file__}:") == 1
    assert "Ask for db.engine where you use it" in caplog.text
    db.stop()


def test_a_listener_of_on_engine_that_raises_is_not_left_out(app: Celery) -> None:
    """Its Engine is not used without it: the next one who asks meets the error too."""
    db = Alchemy(app)

    @db.on_engine
    def fail(engine: Engine) -> None:
        raise Refused

    for _ in range(2):
        with pytest.raises(Refused):
            _ = db.engine


def test_threads_that_ask_first_get_one_engine(app: Celery) -> None:
    """Prepared by the listeners of on_engine before any of them has it."""
    app.conf.alchemy_session_strategy = "per_process"
    db, prepared = Alchemy(app), []
    db.start_worker(WorkerPool(name="prefork", concurrency=2))  # its main process
    strategy = db.strategy
    strategy._engine = None
    barrier = threading.Barrier(4)

    @db.on_engine
    def prepare(engine: Engine) -> None:
        time.sleep(0.01)
        prepared.append(engine)

    prepared.clear()

    def get() -> Engine:
        barrier.wait()
        engine = db.engine
        assert engine in prepared
        return engine

    with ThreadPoolExecutor(4) as executor:
        engines = {one.result() for one in [executor.submit(get) for _ in range(4)]}
    assert len(engines) == 1
    db.stop()


def test_a_tool_that_wraps_create_engine_sees_each_of_our_engines(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrapped after celery_alchemy was imported; that which reads too."""
    seen: list[Engine] = []

    def wrapped(*arguments: Any, **options: Any) -> Engine:
        seen.append(create_engine(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(sqlalchemy, "create_engine", wrapped)
    db = Alchemy(app)
    assert db.engine in seen
    assert db.strategy.read_engine in seen
    db.stop()


def test_sqlalchemy_logs_of_connection_pools_only_what_is_closed(
    app: Celery, sqlite: SQLite, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker's start, and each fork of a pool process, would be a few lines of nothing."""

    def told() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Pool ")]
        caplog.clear()
        return found

    with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, "sqlalchemy"):
        db = Alchemy(app)
        worker_pool = WorkerPool(name="prefork", concurrency=2)
        db.start_worker(worker_pool, "local")
        db.close_before_fork()
        pid = os.fork()
        if pid == 0:
            os._exit(len(told()))  # the connection pool has begun anew
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert told() == []
        db.start_worker(WorkerPool(name="threads", concurrency=2))
        ask(db)
        db.dispose()
        assert [one.split(".")[0] for one in told()] == ["Pool disposed", "Pool recreating"]
        db.stop()
