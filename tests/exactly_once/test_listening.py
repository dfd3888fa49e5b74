"""Listeners on SQLAlchemy's classes are put there once, and in a worker before its threads run tasks.

SQLAlchemy fails a thread that goes through a list of listeners which another one adds to: "deque mutated during
iteration".
"""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import event
from sqlalchemy.pool import Pool

from celery_alchemy import Alchemy, DatabaseTask
from celery_alchemy.strategies.engines import elsewhere
from celery_alchemy.strategies.features import exactly_once, outbox_writing

THREADS = 8


@pytest.mark.parametrize(
    ("module", "begin"),
    [
        pytest.param(elsewhere, lambda: elsewhere.Attempt().end(), id="checkouts"),
        pytest.param(exactly_once, exactly_once.ExactlyOnce, id="sessions"),
        pytest.param(outbox_writing, outbox_writing.listen, id="outbox"),
    ],
)
def test_threads_that_begin_at_the_same_time(
    module: Any, begin: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[tuple[Any, str]] = []
    within = threading.Semaphore(1)
    met: list[str] = []

    def listen(target: Any, name: str, _: object) -> None:
        if not within.acquire(blocking=False):
            met.append(name)
            return
        time.sleep(0.01)
        there.append((target, name))
        within.release()

    def contains(target: Any, name: str, _: object) -> bool:
        return (target, name) in there

    monkeypatch.setattr(module, "event", SimpleNamespace(listen=listen, contains=contains))
    threads = [threading.Thread(target=begin) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == []
    assert there
    assert len(there) == len(set(there))


@pytest.mark.parametrize("which", ["exactly_once", "isolation_retries", None])
@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_worker_with_threads_listens_when_it_starts(which: str | None, pool: str) -> None:
    """One that runs a task at a time does so when it is needed: it costs each checkout a call."""
    app = Celery("listening", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.alchemy_database_url = "sqlite://"
    app.conf.alchemy_session_strategy = "scoped"
    db = Alchemy(app)
    options = {} if which is None else {which: 3 if which == "isolation_retries" else True}

    @app.task(name=f"listening.{which}.{pool}", base=DatabaseTask, shared=False, **options)
    def work() -> None: ...

    app.finalize()
    if event.contains(Pool, "checkout", elsewhere._on_checkout):
        event.remove(Pool, "checkout", elsewhere._on_checkout)
    try:
        app.WorkController(pool_cls=pool, concurrency=4)  # its bootsteps are made, and not started
        assert event.contains(Pool, "checkout", elsewhere._on_checkout) is (pool == "threads" and which is not None)
    finally:
        db.stop()
        app.close()
