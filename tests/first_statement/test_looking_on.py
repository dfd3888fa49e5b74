"""Raw connections, listeners, logs and the user's own classes, with BEGIN along with the first statement."""

import contextlib
import logging
import pkgutil
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import event, insert, text
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only
from support.apps import Isolated
from support.databases import PostgreSQL
from support.first_statement import (
    AWAITED,
    BEGIN,
    COMMIT,
    IDLE,
    IN_TRANSACTION,
    Started,
    copy_in,
    drivers_own,
    raw,
    server_says,
    status,
    trips,
    unit,
    waited,
)
from support.project.models import Row

from celery_alchemy import Alchemy, WorkerPool
from celery_alchemy.loadtests.services.proxy import CountingProxy

# -- raw connections ---------------------------------------------------------------------------------------------------


def several_statements(connection: Any, key: str) -> None:
    with closing(connection.cursor()) as cursor:
        cursor.execute(f"INSERT INTO rows_ (key_, note) VALUES ('{key}', ''); SELECT 1")


def one_statement(connection: Any, key: str) -> None:
    with closing(connection.cursor()) as cursor:
        cursor.execute("INSERT INTO rows_ (key_, note) VALUES (%s, '')", (key,))


def one_statement_after_a_comment(connection: Any, key: str) -> None:
    with closing(connection.cursor()) as cursor:
        cursor.execute("/* a comment */ INSERT INTO rows_ (key_, note) VALUES (%s, '')", (key,))


def composed_statement(connection: Any, key: str) -> None:
    if "psycopg2" in type(connection).__mro__[1].__module__:
        from psycopg2 import sql
    else:
        from psycopg import sql
    with closing(connection.cursor()) as cursor:
        cursor.execute(sql.SQL("INSERT INTO {} (key_, note) VALUES (%s, '')").format(sql.Identifier("rows_")), (key,))


def many_statements(connection: Any, key: str) -> None:
    with closing(connection.cursor()) as cursor:
        cursor.executemany("INSERT INTO rows_ (key_, note) VALUES (%s, '')", [(key,)])


def cursor_of_another_class(connection: Any, key: str) -> None:
    if hasattr(connection, "lobject"):
        from psycopg2.extras import DictCursor

        cursor = connection.cursor(cursor_factory=DictCursor)
    else:
        from psycopg import AsyncClientCursor, ClientCursor

        own = drivers_own(connection)
        cursor = ClientCursor(connection) if own is connection else AsyncClientCursor(own)
    waited(cursor.execute("INSERT INTO rows_ (key_, note) VALUES (%s, '')", (key,)))
    waited(cursor.close())


def function_call(connection: Any, key: str) -> None:
    own = drivers_own(connection)
    with closing(connection.cursor()) as cursor:
        if hasattr(cursor, "callproc"):
            cursor.callproc("pg_sleep", (0,))
        elif own is connection:
            list(cursor.stream("SELECT 1"))
        else:
            await_only(streamed(own))
        cursor.execute("INSERT INTO rows_ (key_, note) VALUES (%s, '')", (key,))


async def streamed(connection: Any) -> None:
    async for _ in connection.cursor().stream("SELECT 1"):
        pass


RAW = [
    one_statement,
    one_statement_after_a_comment,
    several_statements,
    composed_statement,
    many_statements,
    cursor_of_another_class,
    function_call,
    copy_in,
]


@pytest.mark.parametrize("write", RAW)
def test_the_drivers_own_cursor_first(
    db: Alchemy, run_database: PostgreSQL, key: str, write: Callable[[Any, str], None]
) -> None:
    """Nothing commits itself, whatever statement comes first and whoever executes it."""
    with pytest.raises(ZeroDivisionError), db.unit_of_work() as session:
        connection = raw(session)
        assert connection.autocommit is False
        write(connection, key)
        assert connection.autocommit is False
        assert status(session) == IN_TRANSACTION
        raise ZeroDivisionError
    assert run_database.rows(key) == []
    for count in range(2):
        with db.unit_of_work() as session:
            write(raw(session), key)
            write(raw(session), key)
            assert len(run_database.rows(key)) == count
            session.rollback()
            assert (raw(session).autocommit, status(session)) == (False, IDLE)
            write(raw(session), key)
    assert len(run_database.rows(key)) == 2
    for ends_well in (False, True):
        borrowed = db.engine.raw_connection()
        write(borrowed.dbapi_connection, key)
        if ends_well:
            borrowed.commit()
        borrowed.close()
    assert len(run_database.rows(key)) == 3


def test_a_transaction_that_is_ended_by_a_statement(db: Alchemy, run_database: PostgreSQL, key: str) -> None:
    """The next statement begins another one."""
    with pytest.raises(ZeroDivisionError), db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key, note="committed by hand"))
        with closing(raw(session).cursor()) as cursor:
            cursor.execute("COMMIT")
        assert status(session) == IDLE
        session.execute(insert(Row).values(key=key, note="rolled back"))
        assert status(session) == IN_TRANSACTION
        raise ZeroDivisionError
    assert run_database.rows(key) == ["committed by hand"]


def test_the_driver_refuses_in_a_transaction_what_it_always_refused(db: Alchemy) -> None:
    import psycopg
    import psycopg2

    with db.unit_of_work() as session:
        session.execute(text("SELECT 1"))
        connection = raw(session)
        own = drivers_own(connection)
        for name in ("autocommit", "deferrable", "isolation_level"):
            with pytest.raises((psycopg.ProgrammingError, psycopg2.ProgrammingError), match="transaction"):
                if connection is own:
                    setattr(connection, name, 1)
                else:
                    getattr(connection, f"set_{name}")(1)
        with pytest.raises((psycopg.ProgrammingError, psycopg2.ProgrammingError)):
            waited(own.tpc_begin(own.xid(0, "a", "b")))
        assert status(session) == IN_TRANSACTION


# -- who looks on ------------------------------------------------------------------------------------------------------


def test_listeners_and_logs_see_what_they_saw(
    started: Started, key: str, caplog: pytest.LogCaptureFixture, run_database: PostgreSQL
) -> None:
    seen: dict[bool, list[str]] = {}
    for mode in (True, False):
        db = started(mode)
        heard: list[str] = []
        for name in ("begin", "commit"):
            event.listen(db.engine, name, lambda connection, name=name, heard=heard: heard.append(name))

        def before(connection: Any, cursor: Any, statement: str, *rest: Any, heard: list[str] = heard) -> None:
            heard.append(statement)

        event.listen(db.engine, "before_cursor_execute", before)
        caplog.clear()
        with caplog.at_level(logging.INFO, "sqlalchemy.engine"), db.unit_of_work() as session:
            session.execute(insert(Row).values(key=key))
            session.execute(text("SELECT 2"))
        logged = [record.getMessage() for record in caplog.records if record.name.startswith("sqlalchemy.engine")]
        seen[mode] = heard + [line for line in logged if not line.startswith("[")]
    assert seen[True] == seen[False]
    assert "BEGIN (implicit)" in seen[True]


def test_users_cursor_factory(started: Started, proxy: CountingProxy, driver: str) -> None:
    factories = {"psycopg": "psycopg.ClientCursor", "psycopg2": "psycopg2.extras.DictCursor"}
    Factory = pkgutil.resolve_name(factories.get(driver, "psycopg.AsyncClientCursor"))
    db = started(alchemy_engine_options={"connect_args": {"cursor_factory": Factory}})

    def look(session: Session) -> None:
        with closing(raw(session).cursor()) as cursor:
            assert isinstance(cursor if driver != AWAITED else cursor._cursor, Factory)
            cursor.execute("SELECT %s, 'x;y'", (1,))
            cursor.execute("SELECT %s", (1,))

    unit(db, look)
    assert trips(proxy, lambda: unit(db, look)) == BEGIN + 2 + COMMIT  # the semicolon may separate statements
    with db.unit_of_work() as session:
        assert session.scalar(text("SELECT :a"), {"a": 5}) == 5


def test_users_do_connect_listener(started: Started, proxy: CountingProxy) -> None:
    db = started()
    seen = []

    @event.listens_for(db.engine, "do_connect")
    def password(dialect: Any, record: Any, cargs: Any, cparams: dict[str, Any]) -> None:
        seen.append(dialect)
        cparams["application_name"] = "given late"

    db.engine.dispose()

    def look(session: Session) -> None:
        assert server_says(session, "application_name") == ["given late"]

    unit(db, look)
    assert seen
    assert trips(proxy, lambda: unit(db, look)) == 2


def test_an_engine_of_the_users_own(proxy: CountingProxy, driver: str, key: str, run_database: PostgreSQL) -> None:
    if driver == AWAITED:
        pytest.skip("an AsyncEngine of the user's own is refused")
    from sqlalchemy import create_engine

    engine = create_engine(proxy.url)
    app = Isolated("own", broker="memory://", set_as_current=False)
    app.conf.alchemy_begin_with_first_statement = True
    db = Alchemy(app, engine=engine)
    db.start_worker(WorkerPool(name="solo"))

    def one(session: Session) -> None:
        session.add(Row(key=key))

    unit(db, one)
    assert trips(proxy, lambda: unit(db, one)) == 2
    assert len(run_database.rows(key)) == 2
    engine.dispose()
    db.stop()


def test_large_objects_of_psycopg2(db: Alchemy, driver: str) -> None:
    """What docs/round-trips.md says of them: refused after a statement, never written outside a transaction."""
    if driver != "psycopg2":
        pytest.skip("psycopg 3 has no large objects")
    import psycopg2

    with contextlib.suppress(ZeroDivisionError), db.unit_of_work() as session:
        number = raw(session).lobject(0, "w").oid
        raise ZeroDivisionError
    with db.unit_of_work() as session:
        assert session.scalar(text("SELECT count(*) FROM pg_largeobject_metadata WHERE oid = :n"), {"n": number}) == 0
        with pytest.raises(psycopg2.ProgrammingError, match="outside of transactions"):
            raw(session).lobject(0, "w")
