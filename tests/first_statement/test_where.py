"""Where alchemy_begin_with_first_statement is used, and where it is not: who decides, and what the worker says."""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.util import await_only, concurrency
from support import databases, green, servers
from support.apps import make_app
from support.databases import PostgreSQL
from support.first_statement import AWAITED, SETTING, Coroutines, OnLoop, Started, start_worker
from support.project.models import Row

from celery_alchemy import ConfigurationError, WorkerPool
from celery_alchemy.loadtests.errors import ServiceError
from celery_alchemy.loadtests.services.proxy import CountingProxy, DistantProxy
from celery_alchemy.loadtests.services.rundir import run_directory
from celery_alchemy.loadtests.services.servers import PostgreSQLServer
from celery_alchemy.strategies.features import first_statement


def begins_along(engine: Engine) -> bool:
    """Tell whether a new connection of `engine` is of a class of ours, and its cursors are."""
    with engine.connect() as connection:
        found: Any = connection.connection.driver_connection
        ours = [type(found).__name__.startswith("Beginning"), "Beginning" in str(found.cursor_factory)]
    return all(ours)


def is_ordinary(engine: Engine) -> bool:
    """Tell whether a new connection of `engine` begins its transactions as its driver does."""
    with engine.connect() as connection:
        found: Any = connection.connection.driver_connection
        return "Beginning" not in f"{type(found).__name__} {found.cursor_factory}"


@pytest.fixture
def url(run_database: PostgreSQL, driver: str) -> str:
    return green.url_with(run_database, driver.removeprefix("await "), "where")


def pause(seconds: float) -> None:
    if concurrency.in_greenlet():
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


def test_a_long_way_makes_it_worth_while(start: Started, url: str, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(DistantProxy(make_url(url), delay_s=0.005)) as proxy, caplog.at_level(logging.INFO):
        db = start(proxy.url.render_as_string(hide_password=False), "auto")
        assert begins_along(db.engine)
        assert "BEGIN goes with the first statement" in caplog.text
        with db.unit_of_work() as session:
            session.execute(text("SELECT 1"))
        connections = [db.engine.connect() for _ in range(2)]
        assert all("Beginning" in type(one.connection.driver_connection).__name__ for one in connections)
        for one in connections:
            one.close()
        assert caplog.text.count("A round trip to postgresql+") == 1
        db.stop()


def test_a_short_way_leaves_the_driver_alone(
    start: Started, url: str, driver: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(first_statement, "WORTH_WHILE_S", 60.0)
    with CountingProxy(make_url(url)) as proxy, caplog.at_level(logging.INFO):
        db = start(proxy.url.render_as_string(hide_password=False), "auto")
        with db.engine.connect() as one, db.engine.connect() as other:
            kinds = {type(connection.connection.driver_connection.cursor()) for connection in (one, other)}  # type: ignore[union-attr]
        assert "BEGIN has a round trip of its own" in caplog.text
        assert {kind.__module__ for kind in kinds} <= {"psycopg", "psycopg2.extensions"}
        assert is_ordinary(db.engine) or driver == "psycopg"
        before = proxy.round_trips
        with db.unit_of_work() as session:
            session.execute(text("SELECT 1"))
        assert proxy.round_trips == before + 3
        db.stop()


def connect_all(engine: Engine) -> list[str]:
    """Connect in four threads, which have all connected before one gives its connection back."""
    inside = threading.Barrier(4)

    def connect(_: int) -> str:
        inside.wait(timeout=10)
        with engine.connect() as connection:
            kind = type(connection.connection.driver_connection).__name__
            inside.wait(timeout=10)
            return kind

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(connect, range(4)))


async def connect_all_awaited(engine: Engine) -> list[str]:
    """The same in four coroutines."""
    inside = asyncio.Barrier(4)

    def connect() -> str:
        await_only(inside.wait())
        with engine.connect() as connection:
            kind = type(connection.connection.driver_connection).__name__
            await_only(inside.wait())
            return kind

    return await asyncio.wait_for(asyncio.gather(*(concurrency.greenlet_spawn(connect) for _ in range(4))), 30)


def test_connections_made_at_the_same_time_are_of_one_kind(
    url: str, on_loop: OnLoop | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Four connect first. One measures, and all keep to it: a second measurement would say the opposite."""
    answers = itertools.cycle([1.0, 0.0])
    stock = first_statement._is_worth_while

    def slowly(connection: Any, place: str) -> bool:
        pause(0.1)  # long enough for the others to have connected
        return stock(connection, place)

    monkeypatch.setattr(first_statement, "round_trip_s", lambda connection: next(answers))
    monkeypatch.setattr(first_statement, "_is_worth_while", slowly)
    with CountingProxy(make_url(url)) as proxy, caplog.at_level(logging.INFO):
        _, db = make_app(proxy.url.render_as_string(hide_password=False), changes={SETTING: "auto"})
        db.start_worker(WorkerPool(name="threads", concurrency=4))
        kinds = connect_all(db.engine) if on_loop is None else await_only(connect_all_awaited(Coroutines(db).engine))
        db.stop()
    assert all("Beginning" in kind for kind in kinds), kinds
    assert caplog.text.count("A round trip to postgresql+") == 1


def test_a_local_socket_is_not_even_measured(start: Started, driver: str, caplog: pytest.LogCaptureFixture) -> None:
    try:
        with run_directory() as run, PostgreSQLServer(run) as server, caplog.at_level(logging.INFO):
            name = f"postgresql+{driver.removeprefix('await ')}"
            address = server.url.set(drivername=name).render_as_string(hide_password=False)
            db = start(address, "auto")
            assert is_ordinary(db.engine)
            assert "round trip of its own (the server is on a local socket)" in db.strategy.describe()
            assert "A round trip" not in caplog.text
            db.stop()
            db = start(address, True)
            assert begins_along(db.engine)
            db.stop()
    except ServiceError as error:
        pytest.skip(str(error))


def test_off_leaves_the_driver_alone(start: Started, url: str) -> None:
    db = start(url, False)
    assert is_ordinary(db.engine)
    assert "BEGIN" not in db.strategy.describe()
    db.stop()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"creator": lambda: None}, "the engine option 'creator' makes the connections"),
        ({"isolation_level": "AUTOCOMMIT"}, "the Engine is in AUTOCOMMIT"),
    ],
)
def test_the_worker_says_why_not(start: Started, url: str, options: dict[str, Any], reason: str) -> None:
    db = start(url, True, alchemy_engine_options=options)
    assert f"BEGIN has a round trip of its own ({reason})" in db.strategy.describe()
    db.stop()


def test_awaited_connections_of_the_users_own(start: Started, url: str, driver: str) -> None:
    if driver != AWAITED:
        pytest.skip("only what makes awaited connections is given to the driver")
    from psycopg import AsyncConnection

    db = start(url, True, alchemy_engine_options={"connect_args": {"async_creator_fn": AsyncConnection.connect}})
    assert "(connect_args has async_creator_fn)" in db.strategy.describe()
    assert is_ordinary(db.engine)
    db.stop()


def test_a_connection_class_of_the_users_own(start: Started, url: str, driver: str) -> None:
    if driver != "psycopg2":
        pytest.skip("psycopg takes no class of connections")
    from psycopg2.extras import LoggingConnection

    class Own(LoggingConnection):  # type: ignore[misc]
        def filter(self, msg: Any, curs: Any) -> None:
            return None

    options = {"connect_args": {"connection_factory": Own}}
    db = start(url, True, alchemy_engine_options=options)
    assert "(connect_args has connection_factory)" in db.strategy.describe()
    connection: Any = db.engine.dialect.connect(
        **db.engine.dialect.create_connect_args(db.engine.url)[1], connection_factory=Own
    )
    assert type(connection) is Own
    connection.close()
    db.stop()


def test_other_databases_are_left_alone(tmp_path: Path) -> None:
    file = f"sqlite:///{tmp_path / 'file.db'}"
    for mode, said in ((True, "not known how for sqlite with pysqlite"), ("auto", "")):
        db = start_worker(file, mode)
        assert said in db.strategy.describe()
        assert ("BEGIN" in db.strategy.describe()) == bool(said)
        with db.engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        db.stop()


def test_mariadb_is_left_alone(run_name: str, key: str) -> None:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_first") as mariadb:
        db = start_worker(mariadb.url("first"), True)
        with db.unit_of_work() as session:
            session.add(Row(key=key))
        assert len(mariadb.rows(key)) == 1
        assert "not known how for mysql with pymysql" in db.strategy.describe()
        db.stop()


@pytest.mark.parametrize("wrong", ["always", 1, 0.5])
def test_wrong_values_stop_the_worker(start: Started, url: str, wrong: object) -> None:
    with pytest.raises(ConfigurationError, match=rf"{SETTING} is {wrong!r}, but it must be 'auto', True or False"):
        start(url, wrong)


@contextlib.contextmanager
def beside(function: Callable[[], None], on_loop: OnLoop | None) -> Iterator[Callable[[], bool]]:
    """Call `function` in a thread, or a coroutine, of its own; yield what tells whether it runs."""
    if on_loop is None:
        thread = threading.Thread(target=function)
        thread.start()
        yield thread.is_alive
        thread.join(30)
    else:
        task = asyncio.ensure_future(concurrency.greenlet_spawn(function))
        yield lambda: not task.done()
        await_only(asyncio.wait_for(task, 30))


def test_nothing_of_a_failed_measurement_is_left(
    start: Started, on_loop: OnLoop | None, run_database: PostgreSQL, driver: str
) -> None:
    """The connection is lost while it is measured: the error is the driver's, and the next attempt measures again."""
    address = make_url(green.url_with(run_database, driver.removeprefix("await "), "unmeasured"))
    with contextlib.closing(DistantProxy(address, delay_s=0.3)) as proxy:
        db = start(proxy.url.render_as_string(hide_password=False), "auto")
        failed: list[BaseException] = []
        engine = db.engine

        def connect() -> None:
            try:
                engine.connect()
            except OperationalError as error:
                failed.append(error)

        with beside(connect, on_loop) as is_alive:
            while not run_database.connections("unmeasured"):
                pause(0.01)
            while is_alive() and not failed:
                proxy.cut()
                pause(0.05)
        assert failed
        assert engine.pool.checkedout() == 0
        proxy.delay_s = 0.005
        assert begins_along(db.engine)
        db.stop()
