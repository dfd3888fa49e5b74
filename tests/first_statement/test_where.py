"""Where alchemy_begin_with_first_statement is used, and where it is not: who decides, and what the worker says."""

import contextlib
import itertools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, insert, make_url, text
from sqlalchemy.exc import OperationalError
from support import databases, green, servers
from support.apps import make_app
from support.databases import PostgreSQL
from support.pgbouncer import pgbouncer
from support.project.models import Row
from support.waiting import eventually
from support.worker import Site, Worker, running

from celery_alchemy import Alchemy, ConfigurationError, WorkerPool
from celery_alchemy.loadtests.errors import ServiceError
from celery_alchemy.loadtests.services.proxy import CountingProxy, DistantProxy
from celery_alchemy.loadtests.services.rundir import run_directory
from celery_alchemy.loadtests.services.servers import PostgreSQLServer
from celery_alchemy.strategies.features import first_statement

DRIVERS = ("psycopg", "psycopg2")
SETTING = "alchemy_begin_with_first_statement"


def started(url: str, mode: object, **changes: Any) -> Alchemy:
    _, db = make_app(url, changes={SETTING: mode, **changes})
    db.start_worker(WorkerPool(name="threads", concurrency=2))
    return db


def begins_along(engine: Engine) -> bool:
    """Tell whether a new connection of `engine` is of a class of ours, and its cursors are."""
    with engine.connect() as connection:
        found: Any = connection.connection.dbapi_connection
        ours = [type(found).__name__.startswith("Beginning"), "Beginning" in str(found.cursor_factory)]
    return all(ours)


def is_ordinary(engine: Engine) -> bool:
    """Tell whether a new connection of `engine` begins its transactions as its driver does."""
    with engine.connect() as connection:
        found: Any = connection.connection.dbapi_connection
        return "Beginning" not in f"{type(found).__name__} {found.cursor_factory}"


@pytest.fixture
def url(run_database: PostgreSQL, driver: str) -> str:
    return green.url_with(run_database, driver, "where")


def test_a_long_way_makes_it_worth_while(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(DistantProxy(make_url(url), delay_s=0.005)) as proxy, caplog.at_level(logging.INFO):
        db = started(proxy.url.render_as_string(hide_password=False), "auto")
        assert begins_along(db.engine)
        assert "BEGIN goes with the first statement" in caplog.text
        with db.unit_of_work() as session:
            session.execute(text("SELECT 1"))
        connections = [db.engine.connect() for _ in range(2)]
        assert all("Beginning" in type(one.connection.dbapi_connection).__name__ for one in connections)
        for one in connections:
            one.close()
        assert caplog.text.count("A round trip to postgresql+") == 1
        db.stop()


def test_a_short_way_leaves_the_driver_alone(
    url: str, driver: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(first_statement, "WORTH_WHILE_S", 60.0)
    with CountingProxy(make_url(url)) as proxy, caplog.at_level(logging.INFO):
        db = started(proxy.url.render_as_string(hide_password=False), "auto")
        with db.engine.connect() as one, db.engine.connect() as other:
            kinds = {type(connection.connection.dbapi_connection.cursor()) for connection in (one, other)}  # type: ignore[union-attr]
        assert "BEGIN has a round trip of its own" in caplog.text
        assert {kind.__module__ for kind in kinds} <= {"psycopg", "psycopg2.extensions"}
        assert is_ordinary(db.engine) or driver == "psycopg"
        before = proxy.round_trips
        with db.unit_of_work() as session:
            session.execute(text("SELECT 1"))
        assert proxy.round_trips == before + 3
        db.stop()


def test_connections_made_at_the_same_time_are_of_one_kind(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Four threads connect first. One measures, and all keep to it: a second measurement would say the opposite."""
    answers = itertools.cycle([1.0, 0.0])
    inside = threading.Barrier(4)
    stock = first_statement._is_worth_while

    def connect_all(engine: Engine) -> list[str]:
        def connect(_: int) -> str:
            inside.wait(timeout=10)
            with engine.connect() as connection:
                kind = type(connection.connection.dbapi_connection).__name__
                inside.wait(timeout=10)  # all four are checked out
                return kind

        with ThreadPoolExecutor(4) as threads:
            return list(threads.map(connect, range(4)))

    def slowly(connection: Any, place: str) -> bool:
        time.sleep(0.1)  # long enough for the others to have connected
        return stock(connection, place)

    monkeypatch.setattr(first_statement, "round_trip_s", lambda connection: next(answers))
    monkeypatch.setattr(first_statement, "_is_worth_while", slowly)
    with CountingProxy(make_url(url)) as proxy, caplog.at_level(logging.INFO):
        _, db = make_app(proxy.url.render_as_string(hide_password=False), changes={SETTING: "auto"})
        db.start_worker(WorkerPool(name="threads", concurrency=4))
        kinds = connect_all(db.engine)
        db.stop()
    assert all("Beginning" in kind for kind in kinds), kinds
    assert caplog.text.count("A round trip to postgresql+") == 1


def test_a_local_socket_is_not_even_measured(driver: str, caplog: pytest.LogCaptureFixture) -> None:
    try:
        with run_directory() as run, PostgreSQLServer(run) as server, caplog.at_level(logging.INFO):
            address = server.url.set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
            db = started(address, "auto")
            assert is_ordinary(db.engine)
            assert "round trip of its own (the server is on a local socket)" in db.strategy.describe()
            assert "A round trip" not in caplog.text
            db.stop()
            db = started(address, True)
            assert begins_along(db.engine)
            db.stop()
    except ServiceError as error:
        pytest.skip(str(error))


def test_off_leaves_the_driver_alone(url: str) -> None:
    db = started(url, False)
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
def test_the_worker_says_why_not(url: str, options: dict[str, Any], reason: str) -> None:
    db = started(url, True, alchemy_engine_options=options)
    assert f"BEGIN has a round trip of its own ({reason})" in db.strategy.describe()
    db.stop()


def test_a_connection_class_of_the_users_own(url: str, driver: str) -> None:
    if driver == "psycopg":
        pytest.skip("psycopg takes no class of connections")
    from psycopg2.extras import LoggingConnection

    class Own(LoggingConnection):  # type: ignore[misc]
        def filter(self, msg: Any, curs: Any) -> None:
            return None

    options = {"connect_args": {"connection_factory": Own}}
    db = started(url, True, alchemy_engine_options=options)
    assert "(connect_args has a connection_factory)" in db.strategy.describe()
    connection: Any = db.engine.dialect.connect(
        **db.engine.dialect.create_connect_args(db.engine.url)[1], connection_factory=Own
    )
    assert type(connection) is Own
    connection.close()
    db.stop()


def test_other_databases_are_left_alone(tmp_path: Path) -> None:
    file = f"sqlite:///{tmp_path / 'file.db'}"
    for mode, said in ((True, "not known how for sqlite with pysqlite"), ("auto", "")):
        db = started(file, mode)
        assert said in db.strategy.describe()
        assert ("BEGIN" in db.strategy.describe()) == bool(said)
        with db.engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        db.stop()


def test_mariadb_is_left_alone(run_name: str, key: str) -> None:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_first") as mariadb:
        db = started(mariadb.url("first"), True)
        with db.unit_of_work() as session:
            session.add(Row(key=key))
        assert len(mariadb.rows(key)) == 1
        assert "not known how for mysql with pymysql" in db.strategy.describe()
        db.stop()


@pytest.mark.parametrize("wrong", ["always", 1, 0.5])
def test_wrong_values_stop_the_worker(url: str, wrong: object) -> None:
    with pytest.raises(ConfigurationError, match=rf"{SETTING} is {wrong!r}, but it must be 'auto', True or False"):
        started(url, wrong)


def test_nothing_of_a_failed_measurement_is_left(run_database: PostgreSQL, driver: str) -> None:
    """The connection is lost while it is measured: the error is the driver's, and the next attempt measures again."""
    address = make_url(green.url_with(run_database, driver, "unmeasured"))
    with contextlib.closing(DistantProxy(address, delay_s=0.3)) as proxy:
        db = started(proxy.url.render_as_string(hide_password=False), "auto")
        failed: list[BaseException] = []

        def connect() -> None:
            try:
                db.engine.connect()
            except OperationalError as error:
                failed.append(error)

        thread = threading.Thread(target=connect)
        thread.start()
        eventually(lambda: run_database.connections("unmeasured"), "connected")
        while thread.is_alive() and not failed:
            proxy.cut()
            time.sleep(0.05)
        thread.join(30)
        assert failed
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        proxy.delay_s = 0.005
        assert begins_along(db.engine)
        db.stop()


# -- two-phase commit, PgBouncer ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preparing() -> Iterator[PostgreSQL]:
    """A database of a server that prepares transactions."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(PostgreSQLServer(stack.enter_context(run_directory())))
        except ServiceError as error:
            pytest.skip(str(error))
        yield stack.enter_context(databases.new_postgresql(server.url, "prepares"))


def test_two_phase_commit(preparing: PostgreSQL, driver: str, key: str) -> None:
    db = started(green.url_with(preparing, driver, "two_phase"), True)
    with db.engine.connect() as connection:
        for ending in ("commit", "rollback", "commit"):
            transaction = connection.begin_twophase()
            connection.execute(insert(Row).values(key=key, note=ending))
            transaction.prepare()
            assert preparing.column("SELECT count(*) FROM pg_prepared_xacts") == [1]
            getattr(transaction, ending)()
            # and one that is not prepared, between
            connection.execute(insert(Row).values(key=key, note="rolled back"))
            connection.rollback()
    assert preparing.rows(key) == ["commit", "commit"]
    assert preparing.column("SELECT count(*) FROM pg_prepared_xacts") == [0]
    db.stop()


POOLS = {"prefork": 3, "threads": 4, "gevent": 8, "eventlet": 8, "solo": 1}
SERVER_CONNECTIONS = 3


@pytest.fixture(scope="module")
def pooled(run_database: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    server = make_url(run_database.url("unused")).difference_update_query(["application_name"])
    with pgbouncer(server, tmp_path_factory.mktemp("pgbouncer"), pool_size=SERVER_CONNECTIONS) as address:
        yield address


@pytest.mark.parametrize("pool", POOLS)
def test_tasks_behind_pgbouncer(
    site: Site, pooled: Any, run_database: PostgreSQL, driver: str, key: str, pool: str
) -> None:
    """Transaction mode: each transaction is whole, on whatever connection of the server it finds."""
    address = pooled.set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
    worker = Worker(
        site,
        f"{site.prefix[:-1]}-first-{pool}-{driver}",
        pool,
        database_url=address,
        concurrency=POOLS[pool],
        modules=("endings", "pooled"),
        settings={"alchemy_external_pooler": "pgbouncer", "alchemy_application_name": True, SETTING: True},
    )
    with running(worker):
        assert "BEGIN goes with the first statement" in worker.log()
        notes = [str(number) for number in range(40)]
        outcomes = worker.call_together("write_through_pooler", [(key, note) for note in notes])
        assert {outcome.state for outcome in outcomes} == {"SUCCESS"}, outcomes
        assert sorted(run_database.rows(key)) == sorted(notes)
        read = worker.call_together("read_through_pooler", [(key,)] * 10)
        assert [outcome.value for outcome in read] == [[40, "on"]] * 10


# -- interruptions -----------------------------------------------------------------------------------------------------


class Interruption(BaseException):
    """What a signal handler raises."""


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise an Interruption in the main thread."""

    def strike(*_: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGALRM, strike)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first(session: Any, key: str) -> None:
    session.execute(text("SELECT pg_sleep(60)"))


def first_of_many(session: Any, key: str) -> None:
    session.execute(text("INSERT INTO rows_ (key_, note) SELECT :key, pg_sleep(60)::text"), [{"key": key}] * 3)


def second(session: Any, key: str) -> None:
    session.add(Row(key=key))
    session.flush()
    session.execute(text("SELECT pg_sleep(60)"))


@pytest.mark.parametrize("sleep", [first, first_of_many, second])
def test_an_interruption_in_the_middle_of_a_statement(
    run_database: PostgreSQL, key: str, sleep: Callable[[Any, str], None]
) -> None:
    """It is raised as it is, at once; the statement is cancelled, the connection closed, nothing is committed."""
    db = started(green.url_with(run_database, "psycopg", "struck"), True)
    with db.engine.connect():
        pass
    for _ in range(2):
        with pytest.raises(Interruption), interrupted_after(0.3), db.unit_of_work() as session:
            sleep(session, key)
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        eventually(lambda: not run_database.busy("struck"), "the server is done")
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="after"))
    assert run_database.rows(key) == ["after"]
    db.stop()
