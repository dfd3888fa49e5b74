"""What ends a transaction behind the back of its unit of work, and what stays on its connection, with every driver."""

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event, insert, text
from sqlalchemy.orm import Session
from support.project.models import Row
from support.raw import raw_of

from celery_alchemy import Alchemy, BrokenTransaction, CeleryAlchemyError
from celery_alchemy.strategies.engines.transient import is_conflict

# -- a transaction that is ended ---------------------------------------------------------------------------------------


def drivers_rollback(session: Session) -> None:
    raw_of(session).rollback()


def rollback_by_statement(session: Session) -> None:
    session.execute(text("ROLLBACK"))


def rollback_by_raw_cursor(session: Session) -> None:
    cursor = raw_of(session).cursor()
    cursor.execute("ROLLBACK")
    cursor.close()


ENDS = (drivers_rollback, rollback_by_statement, rollback_by_raw_cursor)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("end", ENDS)
def test_a_transaction_that_was_ended_is_not_committed_in_half(
    db: Alchemy, key: str, end: Callable[[Session], None], by_hand: bool
) -> None:
    with pytest.raises(BrokenTransaction, match="cannot be committed"), db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key, note="first"))
        end(session)
        session.execute(insert(Row).values(key=key, note="second"))
        if by_hand:
            session.commit()
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="later"))


def test_ended_by_sqlalchemy_it_may_be_followed_by_another(db: Alchemy, place: tuple[str, Any], key: str) -> None:
    with db.unit_of_work() as session:
        for number in range(3):
            session.add(Row(key=key, note=f"dropped {number}"))
            session.flush()
            session.rollback()
            session.add(Row(key=key, note=f"kept {number}"))
            session.commit()
        with session.begin_nested() as savepoint:
            session.add(Row(key=key, note="dropped"))
            session.flush()
            savepoint.rollback()
        session.connection().exec_driver_sql("SAVEPOINT mine")
        session.connection().exec_driver_sql("ROLLBACK TO SAVEPOINT mine")
        session.add(Row(key=key, note="last"))
    assert place[1].rows(key) == ["kept 0", "kept 1", "kept 2", "last"]


@pytest.mark.parametrize("statement", ["SELECT * FROM no_such_table", "INSERT INTO users (name) VALUES (NULL)"])
def test_an_error_of_one_statement_breaks_no_transaction_but_postgresqls(
    db: Alchemy, place: tuple[str, Any], key: str, statement: str
) -> None:
    breaks = db.engine.dialect.name == "postgresql"
    expected = pytest.raises(BrokenTransaction) if breaks else contextlib.nullcontext()
    with expected, db.unit_of_work() as session:
        session.add(Row(key=key))
        session.flush()
        cursor = raw_of(session).cursor()
        with contextlib.suppress(Exception):
            cursor.execute(statement)
        cursor.close()
    assert len(place[1].rows(key)) == (0 if breaks else 1)


@pytest.mark.parametrize("place", ["pymysql", "mysqldb"], indirect=True)
@pytest.mark.parametrize("raw", [False, True])
def test_a_deadlock_that_was_caught_undoes_all_of_its_transaction(
    db: Alchemy, place: tuple[str, Any], key: str, raw: bool
) -> None:
    """The server has rolled back; what comes after would be committed alone. Its error is the cause."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(2, timeout=30)
    for name in ("a", "b"):
        place[1].execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=f"{key}-{name}")

    def lock(first: str, second: str) -> None:
        try:
            with db.unit_of_work() as session:
                session.execute(insert(Row).values(key=key, note=f"first of {first}"))
                execute(session, first)
                barrier.wait()
                with contextlib.suppress(Exception):
                    execute(session, second)
                session.execute(insert(Row).values(key=key, note=f"second of {first}"))
        except CeleryAlchemyError as error:
            errors.append(error)

    def execute(session: Session, name: str) -> None:
        statement = f"UPDATE counters SET value = value + 1 WHERE key_ = '{key}-{name}'"
        if raw:
            cursor = raw_of(session).cursor()
            cursor.execute(statement)
            cursor.close()
        else:
            session.execute(text(statement))

    threads = [threading.Thread(target=lock, args=names) for names in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    (error,) = errors
    assert isinstance(error, BrokenTransaction)
    assert is_conflict(error)
    rows = place[1].rows(key)
    assert len(rows) == 2
    assert rows[0].removeprefix("first") == rows[1].removeprefix("second")


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_sqlite_rolls_back_by_itself(db: Alchemy, place: tuple[str, Any], key: str) -> None:
    place[1].execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON users WHEN NEW.name = 'x' BEGIN SELECT RAISE(ROLLBACK, 'no'); END"
    )
    with pytest.raises(BrokenTransaction), db.unit_of_work() as session:
        session.add(Row(key=key))
        session.flush()
        with contextlib.suppress(sqlite3.Error):
            raw_of(session).execute("INSERT INTO users (name) VALUES ('x')")
    assert place[1].rows(key) == []


# -- what stays on a connection ----------------------------------------------------------------------------------------


#: A number of 32 bits with every driver.
ONE = "SELECT value FROM (SELECT CAST(1 AS int) AS value) AS one"


def set_autocommit(raw: Any) -> None:
    if callable(getattr(raw, "autocommit", None)):
        raw.autocommit(True)
    elif isinstance(raw, sqlite3.Connection):
        raw.isolation_level = "IMMEDIATE"
    else:
        raw.autocommit = True


def set_attribute(raw: Any) -> None:
    """PyMySQL's and mysqlclient's `autocommit` is a method; SQLite's Connection has none before Python 3.12."""
    with contextlib.suppress(AttributeError):
        raw.autocommit = True


def set_isolation_level(raw: Any) -> None:
    if hasattr(raw, "set_isolation_level"):
        raw.set_isolation_level(3)
    elif hasattr(raw, "set_read_only"):
        raw.set_read_only(True)


def leave_a_transaction(raw: Any) -> None:
    cursor = raw.cursor()
    if isinstance(raw, sqlite3.Connection):
        cursor.execute("BEGIN")
    cursor.execute("INSERT INTO rows_ (key_, note) VALUES ('left', '')")
    cursor.close()


def set_cursor(raw: Any) -> None:
    """Rows of another kind: SQLAlchemy would take the names of columns for their values."""
    if hasattr(raw, "cursor_factory"):
        if hasattr(raw, "set_session"):
            from psycopg2.extras import RealDictCursor as Cursor
        else:
            from psycopg import RawCursor as Cursor
        raw.cursor_factory = Cursor
    elif hasattr(raw, "cursorclass"):
        raw.cursorclass = type("Other", (raw.cursorclass,), {"fetchone": lambda self: ("other",)})
    else:
        raw.row_factory = sqlite3.Row


def register_a_type(raw: Any) -> None:
    """From now on numbers come back as something else, or a text goes there as something else."""
    if hasattr(raw, "adapters"):
        from psycopg.types.string import TextLoader

        raw.adapters.register_loader("int4", TextLoader)
    elif hasattr(raw, "string_types"):
        from psycopg2 import extensions

        extensions.register_type(extensions.new_type((23,), "INT4", lambda value, cursor: value), raw)
    elif hasattr(raw, "decoders"):
        raw.decoders[3] = str
    elif hasattr(raw, "converter"):
        raw.converter[3] = str


def replace_a_type(raw: Any) -> None:
    """The same, for a second time: the number of those that are registered stays."""
    register_a_type(raw)
    register_a_type(raw)


def register_a_parameter(raw: Any) -> None:
    """Texts are sent as something else."""
    if hasattr(raw, "adapters"):
        from psycopg.types.string import StrBinaryDumperVarchar

        raw.adapters.register_dumper(str, StrBinaryDumperVarchar)
    elif hasattr(raw, "encoders"):
        raw.encoders[str] = lambda value, mapping=None: "'other'"


LEAVES = (
    *(set_autocommit, set_attribute, set_isolation_level, leave_a_transaction, set_cursor),
    *(register_a_type, replace_a_type, register_a_parameter),
)


@pytest.mark.parametrize("leave", LEAVES)
def test_what_is_set_on_a_connection_does_not_reach_its_next_user(
    db: Alchemy, place: tuple[str, Any], key: str, leave: Callable[[Any], None]
) -> None:
    raw = db.engine.raw_connection()
    leave(raw.driver_connection)
    raw.close()
    with contextlib.suppress(ZeroDivisionError), db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key, note=""))
        raise ZeroDivisionError
    assert place[1].rows(key) == []
    with db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key, note="kept"))
        assert session.query(Row).filter_by(key=key).one().note == "kept"
        assert session.execute(text(ONE)).scalar() == 1
    assert place[1].rows(key) == ["kept"]
    assert place[1].rows("left") == []


def test_who_leaves_something_is_named_and_what_sqlalchemy_sets_it_sets_back(
    db: Alchemy, caplog: pytest.LogCaptureFixture
) -> None:
    for level in ("SERIALIZABLE", "AUTOCOMMIT"):
        if level == "SERIALIZABLE" or db.engine.dialect.name != "sqlite":
            with db.engine.connect().execution_options(isolation_level=level) as connection:
                connection.execute(text("SELECT 1"))
    assert "has changed a connection" not in caplog.text
    with caplog.at_level(logging.WARNING), db.unit_of_work() as session:
        set_autocommit(raw_of(session))
        session.execute(text("SELECT 1"))
    assert "unit_of_work() at" in caplog.text or db.engine.dialect.name == "postgresql"


def test_a_type_that_a_task_registers_is_named_and_one_of_a_listener_stays(
    db: Alchemy, caplog: pytest.LogCaptureFixture
) -> None:
    def on_connect(dbapi_connection: Any, record: object) -> None:
        register_a_type(dbapi_connection)

    with caplog.at_level(logging.WARNING), db.unit_of_work() as session:
        register_a_type(raw_of(session))
    named = db.engine.dialect.name != "sqlite"
    assert ("unit_of_work() at" in caplog.text) is named
    assert len(caplog.text) < 1_000
    caplog.clear()
    event.listen(db.engine, "connect", on_connect)
    db.engine.dispose()
    for _ in range(2):
        with db.unit_of_work() as session:
            found = session.execute(text("SELECT CAST(1 AS int)")).scalar()
    assert str(found) == "1"
    assert "has changed a connection" not in caplog.text


@pytest.mark.parametrize("place", ["psycopg", "psycopg2"], indirect=True)
def test_what_a_listener_has_set_on_a_new_connection_stays(db: Alchemy, caplog: pytest.LogCaptureFixture) -> None:
    """It leaves its transaction open; the first task's ROLLBACK must not take along what it has set."""

    def on_connect(dbapi_connection: Any, record: object) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute("SET search_path = kept, public")
        cursor.close()

    event.listen(db.engine, "connect", on_connect)
    with contextlib.suppress(ZeroDivisionError), db.unit_of_work() as session:
        session.execute(text("SELECT 1"))
        raise ZeroDivisionError
    with db.unit_of_work() as session:
        assert session.scalar(text("SHOW search_path")) == "kept, public"
    assert "has changed a connection" not in caplog.text
