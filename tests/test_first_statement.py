"""alchemy_begin_with_first_statement: one round trip less, and nothing else that a task could notice."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import event, insert, make_url, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, InternalError, ProgrammingError
from sqlalchemy.orm import Session
from support import green
from support.apps import Isolated, make_app
from support.databases import PostgreSQL
from support.project.models import Counter, Row, User

from celery_alchemy import Alchemy, CeleryAlchemyError, WorkerPool
from celery_alchemy.loadtests.proxy import CountingProxy, counting_proxy

DRIVERS = ("psycopg", "psycopg2")
BEGIN, COMMIT = 1, 1
IN_TRANSACTION, FAILED, IDLE = 2, 3, 0  # libpq's numbers


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def proxy(run_database: PostgreSQL, driver: str) -> Iterator[CountingProxy]:
    with counting_proxy(make_url(green.url_with(run_database, driver, "first"))) as proxy:
        yield proxy


Started = Callable[..., Alchemy]


@pytest.fixture
def started(proxy: CountingProxy, run_database: PostgreSQL) -> Iterator[Started]:
    """Make an Alchemy on the database behind the proxy; afterwards nothing is open."""
    with contextlib.ExitStack() as stack:

        def start(mode: object = True, **changes: Any) -> Alchemy:
            _, db = make_app(
                proxy.url.render_as_string(hide_password=False),
                changes={"alchemy_begin_with_first_statement": mode, **changes},
            )
            db.start_worker(WorkerPool(name="solo"))
            stack.callback(db.stop)
            with db.engine.connect() as connection:  # connecting is not what is counted
                connection.execute(text("SELECT 1"))
            return db

        yield start
        assert run_database.busy("first") == []


@pytest.fixture
def db(started: Started) -> Alchemy:
    return started()


def trips(proxy: CountingProxy, work: Callable[[], object]) -> int:
    before = proxy.round_trips
    work()
    return proxy.round_trips - before


def status(session: Session) -> int:
    """What libpq knows of the transaction."""
    return int(session.connection().connection.dbapi_connection.info.transaction_status)  # type: ignore[union-attr]


def raw(session: Session) -> Any:
    return session.connection().connection.dbapi_connection


def server_says(session: Session, *names: str) -> list[str]:
    return [session.scalar(text(f"SELECT current_setting('{name}')")) or "" for name in names]


def unit(db: Alchemy, work: Callable[[Session], object], **options: Any) -> None:
    with db.unit_of_work(**options) as session:
        work(session)


# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "spared"), [(True, 1), (False, 0)])
def test_begin_is_no_round_trip_of_its_own(
    started: Started, proxy: CountingProxy, run_database: PostgreSQL, key: str, mode: bool, spared: int
) -> None:
    db = started(mode)

    def one(session: Session) -> None:
        session.add(Row(key=key))

    def ten(session: Session) -> None:
        for number in range(10):
            session.execute(text("SELECT :number"), {"number": number})

    for _ in range(12):  # psycopg prepares what it has sent a few times
        unit(db, ten)
        unit(db, one)
    assert trips(proxy, lambda: unit(db, one)) == BEGIN + 1 + COMMIT - spared
    assert trips(proxy, lambda: unit(db, ten)) == BEGIN + 10 + COMMIT - spared
    assert len(run_database.rows(key)) == 13


def test_many_rows_at_once(db: Alchemy, proxy: CountingProxy, run_database: PostgreSQL, driver: str, key: str) -> None:
    """insertmanyvalues, and the driver's executemany; what fails leaves nothing."""
    rows = [{"key": key, "note": str(number)} for number in range(5)]
    assert trips(proxy, lambda: unit(db, lambda session: session.execute(insert(Row), rows))) == 2
    changes = [{"one": one} for one in run_database.column("SELECT id FROM rows_ WHERE key_ = :key", key=key)]

    def change(session: Session) -> None:
        connection = session.connection()
        statement = text("UPDATE rows_ SET note = 'changed' WHERE id = :one")
        assert connection.execute(statement, changes).rowcount == len(changes)

    spared = trips(proxy, lambda: unit(db, change))
    assert spared == (2 if driver == "psycopg" else BEGIN + 5 + COMMIT)  # psycopg2's executemany sends one by one
    assert set(run_database.rows(key)) == {"changed"}
    with pytest.raises(ZeroDivisionError), db.unit_of_work() as session:
        session.execute(insert(Row), rows)
        raise ZeroDivisionError
    assert len(run_database.rows(key)) == 5


def test_returned_rows_and_counts_are_those_of_the_statement(db: Alchemy, key: str) -> None:
    with db.unit_of_work() as session:
        assert session.execute(insert(Row).values(key=key, note="one").returning(Row.note)).all() == [("one",)]
    with db.unit_of_work() as session:
        result: Any = session.execute(update(Row).where(Row.key == key).values(note="two"))
        assert result.rowcount == 1
    with db.unit_of_work() as session:
        assert session.execute(select(Row.note).where(Row.key == key)).all() == [("two",)]
    with db.unit_of_work() as session:
        assert session.execute(text("SELECT '50%' AS a, ';' AS b")).mappings().all() == [{"a": "50%", "b": ";"}]


def test_prepared_statements(db: Alchemy, proxy: CountingProxy, driver: str, key: str) -> None:
    """psycopg prepares the statement that BEGIN goes with; a rollback drops it, and the next time is right again."""

    def insert_one(session: Session) -> None:
        session.add(Row(key=key))

    for _ in range(8):
        unit(db, insert_one)
    with db.unit_of_work() as session:
        prepared = session.scalar(text("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'INSERT%'"))
    assert prepared == (1 if driver == "psycopg" else 0)
    for _ in range(7):
        assert trips(proxy, lambda: unit(db, insert_one)) == 2
        with contextlib.suppress(ZeroDivisionError), db.unit_of_work() as session:
            insert_one(session)
            session.flush()
            raise ZeroDivisionError


# -- what BEGIN says ---------------------------------------------------------------------------------------------------

CHARACTERISTICS = ("transaction_isolation", "transaction_read_only", "transaction_deferrable")


def test_the_isolation_level_of_the_engine(started: Started, proxy: CountingProxy) -> None:
    db = started(alchemy_engine_options={"isolation_level": "REPEATABLE READ"})
    with db.unit_of_work() as session:
        assert server_says(session, "transaction_isolation") == ["repeatable read"]
        session.rollback()
        assert server_says(session, "transaction_isolation") == ["repeatable read"]
    assert trips(proxy, lambda: unit(db, lambda session: session.execute(text("SELECT 1")))) == 2


def test_execution_options_of_a_connection(started: Started, proxy: CountingProxy, driver: str) -> None:
    unprepared = {"connect_args": {"prepare_threshold": None}} if driver == "psycopg" else {}
    db = started(alchemy_engine_options=unprepared)
    options = {"isolation_level": "SERIALIZABLE", "postgresql_readonly": True, "postgresql_deferrable": True}

    def look(expected: list[str], **options: Any) -> None:
        with db.unit_of_work() as session:
            session.connection(execution_options=options)
            before = proxy.round_trips
            assert server_says(session, *CHARACTERISTICS) == expected
            assert proxy.round_trips == before + 3
            # A setting of the session would outlive the transaction.
            assert server_says(session, "default_transaction_isolation") == ["read committed"]

    for _ in range(2):
        look(["serializable", "on", "on"], **options)
        look(["read committed", "off", "off"])
        look(["read committed", "on", "off"], postgresql_readonly=True)
    with pytest.raises(InternalError, match="read-only"), db.unit_of_work(read_only="transaction") as session:
        session.execute(insert(Row).values(key="x"))
    look(["read committed", "off", "off"])


def test_autocommit_as_an_execution_option(db: Alchemy, run_database: PostgreSQL, key: str) -> None:
    with pytest.raises(ZeroDivisionError), db.unit_of_work() as session:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        assert raw(session).autocommit
        session.execute(insert(Row).values(key=key))
        assert status(session) == IDLE
        assert len(run_database.rows(key)) == 1
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key))
        raise ZeroDivisionError
    assert len(run_database.rows(key)) == 1


def test_read_only_tasks_are_as_they_were(db: Alchemy, proxy: CountingProxy) -> None:
    unit(db, lambda session: session.execute(text("SELECT 1")), read_only=True)
    assert trips(proxy, lambda: unit(db, lambda session: session.execute(text("SELECT 1")), read_only=True)) == 1


def test_the_task_is_named_to_the_server_first(started: Started, proxy: CountingProxy) -> None:
    db = started(alchemy_application_name=True)

    def look(session: Session) -> None:
        assert server_says(session, "application_name")[0].startswith("unit_of_work() at ")

    assert trips(proxy, lambda: unit(db, look)) == BEGIN + 2 + COMMIT - 1


# -- savepoints, locks, cursors ----------------------------------------------------------------------------------------


def test_a_savepoint_first(db: Alchemy, proxy: CountingProxy, run_database: PostgreSQL, key: str) -> None:
    def work(session: Session) -> None:
        with contextlib.suppress(ZeroDivisionError), session.begin_nested():
            session.execute(insert(Row).values(key=key, note="undone"))
            raise ZeroDivisionError
        with session.begin_nested():
            session.execute(insert(Row).values(key=key, note="kept"))

    assert trips(proxy, lambda: unit(db, work)) == 6 + COMMIT
    assert run_database.rows(key) == ["kept"]


def test_a_lock_is_held_until_the_commit(db: Alchemy, run_database: PostgreSQL, key: str) -> None:
    run_database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=key)
    free = "SELECT value FROM counters WHERE key_ = :key FOR UPDATE SKIP LOCKED"
    with db.unit_of_work() as session:
        assert session.scalars(select(Counter.value).where(Counter.key == key).with_for_update()).all() == [0]
        assert run_database.column(free, key=key) == []
    assert run_database.column(free, key=key) == [0]


@pytest.mark.parametrize("first", [True, False])
def test_a_server_side_cursor(db: Alchemy, run_database: PostgreSQL, key: str, first: bool) -> None:
    numbers = text("SELECT generate_series(1, :most) AS number, '50%' AS percent")
    with db.unit_of_work() as session:
        if not first:
            session.execute(insert(Row).values(key=key))
        for options in ({"yield_per": 7}, {"stream_results": True}):
            result = session.execute(numbers, {"most": 30}, execution_options=options)
            assert next(result) == (1, "50%")
            assert session.scalar(text("SELECT count(*) FROM pg_cursors")) == 1
            assert [row.number for row in result] == list(range(2, 31))
        assert session.scalar(text("SELECT count(*) FROM pg_cursors")) == 0
        session.execute(insert(Row).values(key=key))
        abandoned = session.execute(numbers, {"most": 300}, execution_options={"yield_per": 7})
        assert next(abandoned).number == 1
        abandoned.close()
    assert len(run_database.rows(key)) == (1 if first else 2)


def copy_in(connection: Any, key: str) -> None:
    statement = "COPY rows_ (key_, note) FROM STDIN"
    with connection.cursor() as cursor:
        if hasattr(cursor, "copy_expert"):
            cursor.copy_expert(statement, io.StringIO(f"{key}\tcopied\n"))
        else:
            with cursor.copy(statement) as copy:
                copy.write_row((key, "copied"))


@pytest.mark.parametrize("first", [True, False])
def test_copy(db: Alchemy, run_database: PostgreSQL, key: str, first: bool) -> None:
    for ends_well in (False, True):
        with contextlib.suppress(ZeroDivisionError), db.unit_of_work() as session:
            if not first:
                session.execute(text("SELECT 1"))
            copy_in(raw(session), key)
            assert status(session) == IN_TRANSACTION
            if not ends_well:
                raise ZeroDivisionError
    assert run_database.rows(key) == ["copied"]


# -- what goes wrong ---------------------------------------------------------------------------------------------------

WRONG = {
    "a syntax error": "SELEC 1",
    "a syntax error further on": "SELECT 1 FROM FROM",
    "an unknown table": "SELECT * FROM nowhere",
    "a division by zero": "SELECT 1 / 0",
    "not in a transaction": "VACUUM",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_first_statement_fails(db: Alchemy, run_database: PostgreSQL, key: str, wrong: str) -> None:
    """Swallowed, it fails the unit of work; and whatever comes after it is refused, not committed by itself."""
    with pytest.raises(CeleryAlchemyError, match="had failed before"), db.unit_of_work() as session:
        with contextlib.suppress(DBAPIError):
            session.execute(text(WRONG[wrong]))
        assert status(session) == FAILED
    with pytest.raises(CeleryAlchemyError, match="had failed before"), db.unit_of_work() as session:
        with contextlib.suppress(DBAPIError):
            session.execute(text(WRONG[wrong]))
        with pytest.raises(DBAPIError, match="transaction is aborted"):
            session.execute(insert(Row).values(key=key))
    with db.unit_of_work() as session:
        with pytest.raises(DBAPIError):
            session.execute(text(WRONG[wrong]))
        session.rollback()
        assert status(session) == IDLE
        session.execute(insert(Row).values(key=key, note="after the rollback"))
    assert run_database.rows(key) == ["after the rollback"]


def test_the_first_flush_fails(db: Alchemy, run_database: PostgreSQL, taken: str, key: str) -> None:
    with pytest.raises(IntegrityError), db.unit_of_work() as session:
        session.add(User(name=taken))
    with db.unit_of_work() as session:
        with pytest.raises(IntegrityError), session.begin_nested():
            session.add(User(name=taken))
            session.flush()
        session.add(Row(key=key))
    assert len(run_database.rows(key)) == 1


def test_a_commit_fails(db: Alchemy, run_database: PostgreSQL, key: str) -> None:
    with pytest.raises(IntegrityError), db.unit_of_work() as session:
        session.execute(text("INSERT INTO children (parent_id) VALUES (-1)"))  # its foreign key is checked at COMMIT
    with db.unit_of_work() as session:
        assert status(session) == IDLE
        session.execute(insert(Row).values(key=key))
    assert len(run_database.rows(key)) == 1


def test_a_value_that_cannot_be_sent(db: Alchemy, run_database: PostgreSQL, key: str) -> None:
    with pytest.raises(ProgrammingError, match="adapt"), db.unit_of_work() as session:
        session.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, '')"), {"key": object()})
    with db.unit_of_work() as session:
        with contextlib.suppress(ProgrammingError):
            session.execute(text("SELECT :value"), {"value": object()})
        session.execute(insert(Row).values(key=key))
    assert len(run_database.rows(key)) == 1


def test_the_server_ends_an_idle_connection(db: Alchemy, run_database: PostgreSQL, key: str) -> None:
    with db.engine.connect() as connection:
        pid = connection.connection.dbapi_connection.info.backend_pid  # type: ignore[union-attr]
        run_database.execute("SELECT pg_terminate_backend(:pid, 5000)", pid=pid)
        with pytest.raises(DBAPIError) as raised:
            connection.execute(text("SELECT 1"))
        assert raised.value.connection_invalidated
    with db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key))
    assert len(run_database.rows(key)) == 1


# -- raw connections ---------------------------------------------------------------------------------------------------


def several_statements(connection: Any, key: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"INSERT INTO rows_ (key_, note) VALUES ('{key}', ''); SELECT 1")


def one_statement(connection: Any, key: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO rows_ (key_, note) VALUES (%s, '')", (key,))


def one_statement_after_a_comment(connection: Any, key: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("/* a comment */ INSERT INTO rows_ (key_, note) VALUES (%s, '')", (key,))


def composed_statement(connection: Any, key: str) -> None:
    if "psycopg2" in type(connection).__mro__[1].__module__:
        from psycopg2 import sql
    else:
        from psycopg import sql
    with connection.cursor() as cursor:
        cursor.execute(sql.SQL("INSERT INTO {} (key_, note) VALUES (%s, '')").format(sql.Identifier("rows_")), (key,))


def many_statements(connection: Any, key: str) -> None:
    with connection.cursor() as cursor:
        cursor.executemany("INSERT INTO rows_ (key_, note) VALUES (%s, '')", [(key,)])


def cursor_of_another_class(connection: Any, key: str) -> None:
    if hasattr(connection, "lobject"):
        from psycopg2.extras import DictCursor

        cursor = connection.cursor(cursor_factory=DictCursor)
    else:
        from psycopg import ClientCursor

        cursor = ClientCursor(connection)
    cursor.execute("INSERT INTO rows_ (key_, note) VALUES (%s, '')", (key,))
    cursor.close()


def function_call(connection: Any, key: str) -> None:
    with connection.cursor() as cursor:
        if hasattr(cursor, "callproc"):
            cursor.callproc("pg_sleep", (0,))
        else:
            list(cursor.stream("SELECT 1"))
        cursor.execute("INSERT INTO rows_ (key_, note) VALUES (%s, '')", (key,))


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
        with raw(session).cursor() as cursor:
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
        for name in ("autocommit", "deferrable", "isolation_level"):
            with pytest.raises((psycopg.ProgrammingError, psycopg2.ProgrammingError), match="transaction"):
                setattr(connection, name, 1)
        with pytest.raises((psycopg.ProgrammingError, psycopg2.ProgrammingError)):
            connection.tpc_begin(connection.xid(0, "a", "b"))
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
    if driver == "psycopg":
        from psycopg import ClientCursor as Factory
    else:
        from psycopg2.extras import DictCursor as Factory
    db = started(alchemy_engine_options={"connect_args": {"cursor_factory": Factory}})

    def look(session: Session) -> None:
        with raw(session).cursor() as cursor:
            assert isinstance(cursor, Factory)
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


def test_an_engine_of_the_users_own(proxy: CountingProxy, key: str, run_database: PostgreSQL) -> None:
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
    if driver == "psycopg":
        pytest.skip("psycopg 3 has no large objects")
    import psycopg2

    with contextlib.suppress(ZeroDivisionError), db.unit_of_work() as session:
        number = raw(session).lobject(0, "w").oid
        raise ZeroDivisionError
    with db.unit_of_work() as session:
        assert session.scalar(text("SELECT count(*) FROM pg_largeobject_metadata WHERE oid = :n"), {"n": number}) == 0
        with pytest.raises(psycopg2.ProgrammingError, match="outside of transactions"):
            raw(session).lobject(0, "w")
