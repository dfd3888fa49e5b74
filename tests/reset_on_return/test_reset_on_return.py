"""alchemy_reset_on_return: what a task leaves on the server's side of its connection does not reach the next one."""

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, event, make_url, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError
from support import databases, green
from support.apps import Isolated, make_app
from support.databases import Database, PostgreSQL
from support.leftovers import WRITES, leftovers
from support.waiting import eventually

from celery_alchemy import Alchemy, ConfigurationError, WorkerPool
from celery_alchemy.loadtests.services.proxy import CountingProxy

DRIVERS = ("psycopg", "psycopg2", "pymysql", "mysqldb")


ALL = pytest.mark.parametrize("driver", DRIVERS)


OF_POSTGRESQL = pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])


ON = {"alchemy_reset_on_return": True}


BACKEND = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT connection_id()"}


OURS = "reset"


@contextlib.contextmanager
def started(url: str, pool: str = "threads", **changes: Any) -> Iterator[Alchemy]:
    _, db = make_app(url, changes=ON | changes)
    db.start_worker(WorkerPool(name=pool, concurrency=1))
    try:
        yield db
    finally:
        db.stop()


def run(db: Alchemy, *statements: str, read_only: Any = False) -> Any:
    """Execute statements in a unit of work; return the value of the last one."""
    with db.unit_of_work(read_only=read_only) as session:
        for statement in statements:
            result = session.execute(text(statement.replace(":", r"\:")))
            value = result.scalar() if result.returns_rows else None
        return value


def backend(db: Alchemy, read_only: Any = False) -> Any:
    return run(db, BACKEND[db.engine.dialect.name], read_only=read_only)


@ALL
def test_the_next_task_sees_nothing_of_it(request: pytest.FixtureRequest, database: Database, driver: str) -> None:
    """On the same connection; and without the setting it sees all of it."""
    role = request.getfixturevalue("role") if isinstance(database, databases.MariaDB) else ""
    url = green.url_with(database, driver, OURS)
    for name, one in leftovers(driver, role).items():
        with started(url) as db:
            assert run(db, one.look) == one.clean, f"{name}: a new connection"
            first = backend(db)
            run(db, *one.leave)
            assert run(db, one.look) == one.clean, name
            run(db, *one.leave)
            assert (run(db, one.look), backend(db)) == (one.clean, first), f"{name}: the same connection, once more"
    seen = set()
    for name in ("role", "own setting", "temporary table", "user variable", "user lock", "database"):
        one = leftovers(driver, role).get(name)
        if one is not None:
            with started(url, alchemy_reset_on_return=False) as db:
                run(db, *one.leave)
                with contextlib.suppress(Exception):
                    assert run(db, one.look) == one.clean
                    seen.add(name)
    assert seen == set(), "these are not left at all: the test would prove nothing"


@ALL
def test_what_the_next_task_must_not_be_able_to_use(database: Database, driver: str) -> None:
    url = green.url_with(database, driver, OURS)
    leave, use = ("PREPARE of_mine FROM 'SELECT 1'", "EXECUTE of_mine")
    if isinstance(database, PostgreSQL):
        leave, use = ("SELECT nextval('rows__id_seq')", "SELECT lastval()")
    with started(url, alchemy_reset_on_return=False) as db:
        run(db, leave)
        assert run(db, use)
    with started(url) as db:
        run(db, leave)
        with pytest.raises(DBAPIError):
            run(db, use)


@ALL
def test_a_connection_for_reading(request: pytest.FixtureRequest, database: Database, driver: str) -> None:
    """Each statement commits itself there; it stays read-only, whatever a task has done to it."""
    role = request.getfixturevalue("role") if isinstance(database, databases.MariaDB) else ""
    writes = "SET SESSION TRANSACTION READ WRITE" if role else WRITES
    asks = "SELECT @@tx_read_only" if role else "SHOW default_transaction_read_only"
    with started(green.url_with(database, driver, OURS)) as db:
        first, clean = backend(db, True), {}
        for name, one in leftovers(driver, role).items():
            clean[name] = run(db, one.look, read_only=True)
        for name, one in leftovers(driver, role).items():
            run(db, writes, *one.leave, read_only=True)
            assert run(db, one.look, read_only=True) == clean[name], name
            assert run(db, asks, read_only=True) in {"on", 1}
        assert backend(db, True) == first


@OF_POSTGRESQL
@pytest.mark.parametrize("begins", [True, False], ids=["begin along", "begin by itself"])
def test_what_was_set_when_it_was_made_stays(database: PostgreSQL, driver: str, begins: bool) -> None:
    """By us, by options of create_engine, by the user's listeners, whenever they were put on."""
    settings = {
        "alchemy_statement_timeout_s": 7,
        "alchemy_begin_with_first_statement": begins,
        "alchemy_engine_options": {"isolation_level": "REPEATABLE READ"},
    }

    def set_up(dbapi_connection: Any, record: object) -> None:
        before, dbapi_connection.autocommit = dbapi_connection.autocommit, True
        with dbapi_connection.cursor() as cursor:
            cursor.execute("SET TIME ZONE 'Asia/Tokyo'; SET search_path = public, pg_temp")
            cursor.execute("SET app.one = 'it''s \\ here'")
            cursor.execute("SELECT set_config(%s, %s, false)", ("app.two", "two"))
            cursor.execute("SET ROLE pg_monitor")
        dbapi_connection.autocommit = before

    asks = (
        "SELECT concat_ws(' | ', current_setting('statement_timeout'), current_setting('transaction_isolation'),"
        " current_setting('TimeZone'), current_setting('search_path'), current_setting('app.one'),"
        " current_setting('app.two'), current_user, current_setting('client_connection_check_interval'))"
    )
    with started(green.url_with(database, driver, OURS), **settings) as db:
        db.on_engine(lambda engine: event.listen(engine, "connect", set_up))
        new, first = run(db, asks), backend(db)
        assert new.startswith("7s | repeatable read | Asia/Tokyo | public, pg_temp | it's \\ here | two | pg_monitor")
        run(
            db, "RESET ROLE", "SET app.one = ''", "SET app.two = ''", "SET search_path = ''",
            "SET statement_timeout = 0", "SET client_connection_check_interval = 0", "SET TIME ZONE 'UTC'",
            "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        )  # fmt: skip
        assert (run(db, asks), backend(db)) == (new, first)


@pytest.mark.parametrize("driver", ["pymysql", "mysqldb"])
def test_what_was_set_when_it_was_made_stays_on_mariadb(database: Database, driver: str) -> None:
    options = {
        "isolation_level": "READ COMMITTED",
        "connect_args": {"init_command": "SET @of_init = 'it''s', SESSION wait_timeout = 1234"},
    }

    def set_up(dbapi_connection: Any, record: object) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute("SET time_zone = '+09:00', sql_mode = 'ANSI', @mine = 5")
        cursor.close()

    asks = (
        "SELECT CONCAT_WS(' | ', @@max_statement_time, @@tx_isolation, @of_init, @@wait_timeout, @@time_zone, @mine,"
        " @@sql_mode LIKE '%ANSI%', @@autocommit)"
    )
    settings = {"alchemy_statement_timeout_s": 7, "alchemy_engine_options": options}
    with started(green.url_with(database, driver, OURS), **settings) as db:
        db.on_engine(lambda engine: event.listen(engine, "connect", set_up))
        new, first = run(db, asks), backend(db)
        assert new == "7.000000 | READ-COMMITTED | it's | 1234 | +09:00 | 5 | 1 | OFF"
        run(db, "SET max_statement_time = 0, time_zone = 'SYSTEM', sql_mode = '', wait_timeout = 5, autocommit = 1")
        run(db, "SET @of_init = NULL, @mine = NULL", "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        assert (run(db, asks), backend(db)) == (new, first)


@pytest.mark.parametrize("driver", ["psycopg"])
def test_prepared_statements_of_the_driver_stay(database: PostgreSQL, driver: str) -> None:
    asks = "SELECT count(*) FROM pg_prepared_statements WHERE NOT from_sql"
    with started(database.url(OURS)) as db:
        for read_only in (False, True):
            for _ in range(7):
                found = run(db, asks, read_only=read_only)
            assert found == 1


@pytest.mark.parametrize(("driver", "more"), [("psycopg", 1), ("psycopg2", 1), ("pymysql", 1), ("mysqldb", 4)])
def test_round_trips(database: Database, driver: str, more: int) -> None:
    """One more for a task; mysqlclient authenticates again."""
    with CountingProxy(make_url(green.url_with(database, driver, OURS))) as proxy:
        costs = {}
        for on in (True, False):
            url = proxy.url.render_as_string(hide_password=False)
            with started(url, alchemy_reset_on_return=on) as db:
                for read_only in (False, True):
                    run(db, "SELECT 1", read_only=read_only)
                    before = proxy.round_trips
                    run(db, "SELECT 1", read_only=read_only)
                    costs[on, read_only] = proxy.round_trips - before
    assert costs[True, True] - costs[False, True] == more
    # Without the setting mysqlclient's connection pool rolls back what a Session has committed.
    assert costs[True, False] - costs[False, False] == (more - 1 if driver == "mysqldb" else more)


@ALL
def test_where_it_fails_the_connection_is_closed(
    database: Database, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning names the task."""
    with started(green.url_with(database, driver, OURS)) as db:
        with db.unit_of_work(read_only=True) as session:
            first = session.execute(text(BACKEND[db.engine.dialect.name])).scalar_one()
            if isinstance(database, PostgreSQL):
                database.execute("SELECT pg_terminate_backend(:pid)", pid=first)
                eventually(lambda: first not in [c.pid for c in database.connections(OURS)], "it is gone")
            else:
                database.execute(f"KILL {first}")
            with caplog.at_level(logging.WARNING, "celery_alchemy"):
                session.close()
        said = [one for one in caplog.messages if "cannot be reset" in one]
        assert len(said) == 1
        assert re.match(r"unit_of_work\(\) at .*test_reset_on_return\.py:\d+: what it has left on its conn", said[0])
        assert backend(db, True) != first
        assert db.strategy.read_engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pymysql"])
def test_a_connection_that_lives_and_cannot_be_reset_is_closed(
    database: Database, driver: str, run_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The role that it had when it was made is gone; what the task has left on it must not stay."""
    gone = f"{run_name}_gone"
    database.execute(f"CREATE ROLE {gone}")

    def become(dbapi_connection: Any, record: object) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute(f"SET ROLE {gone}")
        cursor.close()
        dbapi_connection.commit()

    with started(green.url_with(database, driver, OURS)) as db:
        db.on_engine(lambda engine: event.listen(engine, "connect", become))
        first = backend(db)
        event.remove(db.engine, "connect", become)
        with caplog.at_level(logging.WARNING, "celery_alchemy"), db.unit_of_work() as session:
            for statement in ("SET ROLE NONE", "SELECT 1"):
                session.execute(text(statement))
            database.execute(f"DROP ROLE {gone}")
        assert len([one for one in caplog.messages if "cannot be reset" in one]) == 1
        eventually(lambda: first not in [c.pid for c in database.connections(OURS)], "it is closed")
        assert backend(db) != first


@OF_POSTGRESQL
def test_notifications_do_not_reach_the_next_task(database: PostgreSQL, driver: str) -> None:
    with started(green.url_with(database, driver, OURS)) as db:
        run(db, "LISTEN somebody", "NOTIFY somebody")
        run(db, "SELECT 1")
        with db.unit_of_work() as session:
            raw: Any = session.connection().connection.dbapi_connection
            if driver == "psycopg2":
                raw.poll()
                assert raw.notifies == []
            else:
                raw.commit()
                raw.autocommit = True
                assert list(raw.notifies(timeout=0)) == []
                raw.autocommit = False


@OF_POSTGRESQL
@pytest.mark.parametrize("ends", ["rollback", "commit", None])
def test_the_users_own_engine(database: PostgreSQL, key: str, driver: str, ends: Any) -> None:
    """Its `pool_reset_on_return` stays: what code of the user's leaves open ends as before, and is reset then."""
    engine = create_engine(
        green.url_with(database, driver, OURS), pool_size=1, max_overflow=0, pool_reset_on_return=ends
    )
    app = Isolated("own", broker="memory://", set_as_current=False, changes=dict(ON))  # Celery writes into it
    db = Alchemy(app, engine=engine)
    db.start_worker(WorkerPool(name="threads", concurrency=1))
    raw: Any = engine.raw_connection()
    with contextlib.closing(raw.cursor()) as cursor:
        cursor.execute("SET app.tenant = 'a'")
        cursor.execute("INSERT INTO rows_ (key_, note) VALUES (%s, 'left open')", (key,))
    raw.close()
    assert database.rows(key) == (["left open"] if ends == "commit" else [])
    for read_only in (False, True):
        run(db, "SET app.tenant = 'a'", read_only=read_only)
        asks = "SELECT coalesce(current_setting('app.tenant', true), '')"
        assert run(db, asks, read_only=read_only) == ""
    db.stop()
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg"])
def test_off_nothing_listens(database: PostgreSQL, driver: str) -> None:
    def listeners(engine: Engine) -> int:
        found: Any = engine.pool.dispatch
        return sum(len(list(event)) for event in (found.reset, found.checkout, found.checkin))

    url = database.url(OURS)
    those_of_any_pool = listeners(create_engine(url))  # what another test's libraries listen to everywhere

    def listens(engine: Engine) -> bool:
        return listeners(engine) > those_of_any_pool

    with started(url, alchemy_reset_on_return=False) as db:
        assert not listens(db.engine)
    with started(url) as db:
        assert listens(db.engine)
    with started(url, alchemy_engine_options={"poolclass": NullPool}) as db:
        assert not listens(db.engine) or not db.engine.pool.dispatch.reset  # type: ignore[attr-defined]
        run(db, "SET app.tenant = 'a'")
        assert not run(db, "SELECT current_setting('app.tenant', true)")


REFUSED = {
    "PgBouncer stands before it": {"alchemy_external_pooler": "pgbouncer"},
    "SQLite has no server": {"alchemy_database_url": "sqlite://"},
}


@pytest.mark.parametrize("driver", ["psycopg"])
@pytest.mark.parametrize("reason", REFUSED)
def test_where_it_cannot_be_done_the_worker_does_not_start(database: PostgreSQL, driver: str, reason: str) -> None:
    _, db = make_app(None, changes=ON | {"alchemy_database_url": database.url(OURS)} | REFUSED[reason])
    with pytest.raises(ConfigurationError, match=rf"alchemy_reset_on_return=True, .* 'default' .*{reason}"):
        db.start_worker(WorkerPool(name="threads", concurrency=1))


@pytest.mark.parametrize("driver", ["psycopg"])
def test_each_database_may_say_it(database: PostgreSQL, driver: str) -> None:
    other = {
        "reports": {"url": "sqlite://", "reset_on_return": False},
        "left": {"url": database.url(OURS), "reset_on_return": False},
    }
    leave, asks = "SET app.tenant = 'a'", "SELECT coalesce(current_setting('app.tenant', true), '')"
    with started(database.url(OURS), alchemy_databases=other) as db:
        for name, found in (("default", ""), ("left", "a")):
            one = db.databases[name]
            with one.unit_of_work() as session:
                session.execute(text(leave))
            with one.unit_of_work() as session:
                assert session.scalar(text(asks)) == found
        for one in db.databases.values():
            one.stop()
