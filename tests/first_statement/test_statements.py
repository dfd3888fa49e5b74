"""alchemy_begin_with_first_statement: one round trip less, and nothing else that a task could notice."""

import contextlib
from typing import Any

import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, InternalError, ProgrammingError
from sqlalchemy.orm import Session
from support.databases import PostgreSQL
from support.first_statement import (
    BEGIN,
    COMMIT,
    FAILED,
    IDLE,
    IN_TRANSACTION,
    Started,
    copy_in,
    raw,
    server_says,
    status,
    trips,
    unit,
)
from support.project.models import Counter, Row, User

from celery_alchemy import Alchemy, CeleryAlchemyError
from celery_alchemy.loadtests.services.proxy import CountingProxy

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
    assert spared == (2 if driver != "psycopg2" else BEGIN + 5 + COMMIT)  # psycopg2's executemany sends one by one
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
    assert prepared == (1 if driver != "psycopg2" else 0)
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
    unprepared = {"connect_args": {"prepare_threshold": None}} if driver != "psycopg2" else {}
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
