"""Statements given as text that end a transaction, and what is executed after them, with every driver."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import create_engine, insert, inspect, text
from sqlalchemy.orm import Session
from sqlalchemy.schema import DDL
from support.project.models import Row
from support.raw import raw_of

from celery_alchemy import Alchemy, BrokenTransaction, WorkerPool
from celery_alchemy.strategies.drivers.texts import what_ends

POSTGRESQL = ("psycopg", "psycopg2")
postgresql = pytest.mark.parametrize("place", POSTGRESQL, indirect=True)
both_modes = pytest.mark.parametrize("begins_with_first", [False, True])


@pytest.fixture
def begins_with_first() -> bool:
    return False


@pytest.fixture
def db(place: tuple[str, Any], begins_with_first: bool) -> Any:
    app = Celery("texts", broker="memory://", set_as_current=False)
    app.conf.update(alchemy_database_url=place[0], alchemy_begin_with_first_statement=begins_with_first)
    db = Alchemy(app)
    db.start_worker(WorkerPool(name="solo"))
    yield db
    db.stop()


def as_text(session: Session, statement: str) -> None:
    session.execute(text(statement))


def by_the_driver(session: Session, statement: str) -> None:
    session.connection().exec_driver_sql(statement)


def without_parameters(session: Session, statement: str) -> None:
    session.connection().exec_driver_sql(statement, execution_options={"no_parameters": True})


def as_ddl(session: Session, statement: str) -> None:
    session.execute(DDL(statement))


@postgresql
@both_modes
@pytest.mark.parametrize("execute", [as_text, by_the_driver, without_parameters, as_ddl])
def test_ended_and_begun_in_one_statement_it_is_not_committed_in_half(
    db: Alchemy, place: tuple[str, Any], key: str, execute: Callable[[Session, str], None]
) -> None:
    for statement in (
        *("ROLLBACK AND CHAIN", "rollback; begin", "/* no more */ ABORT AND CHAIN"),
        "SELECT 1; ROLLBACK; START TRANSACTION",
    ):  # fmt: skip
        with pytest.raises(BrokenTransaction, match="was executed"), db.unit_of_work() as session:
            session.execute(insert(Row).values(key=key, note="first"))
            execute(session, statement)
            session.execute(insert(Row).values(key=key, note="second"))
        assert place[1].rows(key) == []


@postgresql
@both_modes
def test_after_an_error_that_was_caught_too(db: Alchemy, place: tuple[str, Any], key: str) -> None:
    with pytest.raises(BrokenTransaction), db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key, note="first"))
        with contextlib.suppress(Exception):
            session.connection().exec_driver_sql("SELECT * FROM no_such_table")
        session.connection().exec_driver_sql("ROLLBACK AND CHAIN")
        session.execute(insert(Row).values(key=key, note="second"))
    assert place[1].rows(key) == []


@pytest.mark.parametrize("place", ["psycopg", "psycopg2", "sqlite"], indirect=True)
@pytest.mark.parametrize("raw", [False, True])
def test_what_follows_a_rollback_is_not_committed_by_itself(
    db: Alchemy, place: tuple[str, Any], key: str, raw: bool
) -> None:
    for begins in (False, True):
        with pytest.raises(Exception, match=r"cannot be committed|cannot start a tr"), db.unit_of_work() as session:
            session.execute(insert(Row).values(key=key, note="first"))
            if raw:
                raw_of(session).cursor().execute("ROLLBACK")
            else:
                session.execute(text("ROLLBACK"))
            if begins:
                session.execute(text("BEGIN"))
            session.execute(insert(Row).values(key=key, note="second"))
        assert place[1].rows(key) == []


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_what_follows_an_error_that_has_rolled_back_is_not_either(
    db: Alchemy, place: tuple[str, Any], key: str
) -> None:
    place[1].execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON users WHEN NEW.name = 'x' BEGIN SELECT RAISE(ROLLBACK, 'no'); END"
    )
    with pytest.raises(BrokenTransaction), db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key, note="first"))
        with contextlib.suppress(Exception):
            session.connection().exec_driver_sql("INSERT INTO users (name) VALUES ('x')")
        session.execute(insert(Row).values(key=key, note="second"))
    assert place[1].rows(key) == []


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 'ROLLBACK; BEGIN'",
        'SELECT 1 AS "commit; rollback" -- ; ROLLBACK',
        "SELECT CASE WHEN true THEN 1 END",
        "DO $$ BEGIN PERFORM 1; END $$",
        "DO $body$ BEGIN PERFORM 'x'; END $body$; SELECT 1",
        "SAVEPOINT mine; ROLLBACK TO mine",
        "SAVEPOINT mine; ROLLBACK WORK TO SAVEPOINT mine; RELEASE mine",
        "CREATE FUNCTION pg_temp.one() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END",
        "PREPARE mine AS SELECT 1; DEALLOCATE mine",
        "BEGIN",
    ],
)
@postgresql
@both_modes
def test_what_only_looks_like_an_end_is_none(db: Alchemy, place: tuple[str, Any], key: str, statement: str) -> None:
    with db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key, note="first"))
        session.connection().exec_driver_sql(statement)
        session.execute(insert(Row).values(key=key, note="second"))
    assert place[1].rows(key) == ["first", "second"]


def test_which_texts_end_a_transaction() -> None:
    for ends in ("ROLLBACK", " rollback work", "SELECT 1; abort", "/* a */ Rollback and chain", "'a''b'; ROLLBACK"):
        assert what_ends(ends) == "ROLLBACK", ends
    for ends in ("COMMIT", "end", "-- why\nCOMMIT AND CHAIN", "PREPARE TRANSACTION 'x'", r"SELECT '\'; COMMIT; BEGIN"):
        assert what_ends(ends) == "COMMIT", ends
    for ends in ("ROLLBACK PREPARED 'x'", "commit prepared 'x'", r"SELECT E'\'; COMMIT; BEGIN'", "SELECT end_ FROM t"):
        assert what_ends(ends) is None, ends


@pytest.mark.parametrize("place", POSTGRESQL, indirect=True)
def test_outside_tasks_a_commit_lets_what_works_in_no_transaction_work(place: tuple[str, Any], key: str) -> None:
    """The known way with psycopg2, on an Engine that serves tasks too."""
    engine = create_engine(place[0])
    db = Alchemy(Celery("texts", broker="memory://", set_as_current=False), engine=engine)
    assert db.engine is engine
    if engine.dialect.driver == "psycopg2":
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            connection.execute(text("COMMIT"))
            connection.execute(text("VACUUM rows_"))
    engine.dispose()


# -- what is no loss ---------------------------------------------------------------------------------------------------


def reads_a_with(session: Session) -> None:
    session.execute(text("WITH x AS (SELECT 1 AS a) SELECT a FROM x")).all()


def reads_by_connection(session: Session) -> None:
    session.connection().execute(text("SELECT 1")).all()


def reads_by_raw_cursor(session: Session) -> None:
    cursor = raw_of(session).cursor()
    cursor.execute("SELECT 1")
    cursor.fetchall()
    cursor.close()


def inspects(session: Session) -> None:
    inspect(session.connection()).get_table_names()


@pytest.mark.parametrize("read", [reads_a_with, reads_by_connection, reads_by_raw_cursor, inspects])
def test_a_close_after_reading_loses_nothing(
    db: Alchemy, place: tuple[str, Any], key: str, read: Callable[[Session], None]
) -> None:
    with db.unit_of_work() as session:
        read(session)
        session.close()
        db.session.add(Row(key=key, note="after"))
    assert place[1].rows(key) == ["after"]


@postgresql
@both_modes
def test_a_transaction_that_the_driver_has_begun_and_ended_itself_is_right(
    db: Alchemy, place: tuple[str, Any], key: str
) -> None:
    def in_a_block(session: Session, note: str) -> None:
        raw = raw_of(session)
        with raw.transaction() if hasattr(raw, "transaction") else raw:
            cursor = raw.cursor()
            cursor.execute(f"INSERT INTO rows_ (key_, note) VALUES ('{key}', '{note}')")
            cursor.close()

    with db.unit_of_work() as session:
        in_a_block(session, "by the driver")
    with db.unit_of_work() as session:
        in_a_block(session, "by the driver")
        in_a_block(session, "again")
        session.add(Row(key=key, note="by the session"))
    assert place[1].rows(key) == ["by the driver", "by the driver", "again", "by the session"]
    if db.engine.dialect.driver == "psycopg2":  # psycopg makes a savepoint of it
        with pytest.raises(BrokenTransaction), db.unit_of_work() as session:
            session.execute(insert(Row).values(key=key, note="first"))
            in_a_block(session, "ends the transaction of the Session")
            session.execute(insert(Row).values(key=key, note="second"))
