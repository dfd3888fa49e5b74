"""MySQL and MariaDB: statements that run others, comments, and a driver that connects anew."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.orm import Session
from support.project.models import Row
from support.raw import raw_of

from celery_alchemy import Alchemy, BrokenTransaction
from celery_alchemy.strategies.errors import SessionClosedEarly

pytestmark = pytest.mark.parametrize("place", ["pymysql", "mysqldb"], indirect=True)

PROCEDURES = {
    "lost_rollback": "ROLLBACK;",
    "lost_late": "SELECT 1; ROLLBACK;",
    "lost_handler": (
        "DECLARE EXIT HANDLER FOR SQLEXCEPTION BEGIN ROLLBACK; RESIGNAL; END; "
        "INSERT INTO users (name) VALUES ('twice'), ('twice');"
    ),
    "lost_nothing": "SELECT 1; SELECT 2;",
    "lost_writing": "INSERT INTO counters (key_, value) VALUES (uuid(), 0);",
}


@pytest.fixture
def procedures(place: tuple[str, Any]) -> None:
    for name, body in PROCEDURES.items():
        place[1].execute(f"CREATE OR REPLACE PROCEDURE {name}() BEGIN {body} END")


def executing(statement: str) -> Callable[[Session], None]:
    def execute(session: Session) -> None:
        with contextlib.suppress(Exception):
            session.execute(text(statement)).close()

    return execute


def connect_anew(session: Session) -> None:
    raw = raw_of(session)
    other = session.get_bind().connect()  # type: ignore[union-attr]
    other.execute(text(f"KILL {raw.thread_id()}"))
    other.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        with contextlib.suppress(Exception):
            raw.ping(True)
        raw.ping(True)


def begin_another_session(session: Session) -> None:
    raw = raw_of(session)
    if hasattr(raw, "change_user"):
        raw.change_user("root", "", session.scalar(text("SELECT DATABASE()")))
    else:
        raw.close()
        raw.connect()


ENDS = {
    "CALL": executing("CALL lost_rollback()"),
    "CALL with results": executing("CALL lost_late()"),
    "CALL that fails": executing("CALL lost_handler()"),
    "callproc": lambda session: raw_of(session).cursor().callproc("lost_rollback"),
    "EXECUTE": executing("EXECUTE IMMEDIATE 'ROLLBACK'"),
    "a block": executing("BEGIN NOT ATOMIC ROLLBACK; END"),
    "an executable comment": executing("/*! ROLLBACK */"),
    "a comment before": executing("/* shop.transfer */ ROLLBACK"),
    "a line of comment before": executing("-- shop.transfer\nROLLBACK AND CHAIN"),
    "connected anew": connect_anew,
    "another session": begin_another_session,
}


@pytest.mark.parametrize("more", [True, False], ids=["more", "no more"])
@pytest.mark.parametrize("end", ENDS)
def test_a_transaction_that_was_ended_otherwise_is_not_committed_in_half(
    db: Alchemy, place: tuple[str, Any], procedures: None, key: str, end: str, more: bool
) -> None:
    with pytest.raises(BrokenTransaction, match="cannot be committed"), db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key, note="first"))
        ENDS[end](session)
        if more:
            session.execute(insert(Row).values(key=key, note="second"))
    assert place[1].rows(key) == []
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="later"))
    assert place[1].rows(key) == ["later"]


@pytest.mark.parametrize(
    "statement",
    [
        *("CALL lost_nothing()", "CALL lost_writing()", "EXECUTE IMMEDIATE 'SELECT 1'", "SELECT 'rollback'"),
        *("BEGIN NOT ATOMIC SELECT 1; SELECT 2; END", "/*!50000 SELECT 1 */", "TRUNCATE TABLE counters"),
    ],
)
def test_what_loses_nothing_is_allowed(
    db: Alchemy, place: tuple[str, Any], procedures: None, key: str, statement: str
) -> None:
    with db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key, note="first"))
        session.execute(text(statement)).close()
        raw_of(session).ping()
        session.execute(insert(Row).values(key=key, note="second"))
    assert place[1].rows(key) == ["first", "second"]


def test_a_procedure_that_rolls_back_where_nothing_was_written_loses_nothing(
    db: Alchemy, place: tuple[str, Any], procedures: None, key: str
) -> None:
    with db.unit_of_work() as session:
        session.execute(text("CALL lost_rollback()"))
        session.execute(insert(Row).values(key=key, note="first"))
        session.rollback()
        session.execute(text("CALL lost_rollback()"))
        session.execute(insert(Row).values(key=key, note="kept"))
    assert place[1].rows(key) == ["kept"]


@pytest.mark.parametrize("statement", ["-- shop\nINSERT INTO counters VALUES (uuid(), 0)", "CALL lost_writing()"])
def test_a_close_that_loses_what_was_written_so_fails(
    db: Alchemy, place: tuple[str, Any], procedures: None, statement: str
) -> None:
    with pytest.raises(SessionClosedEarly), db.unit_of_work() as session:
        session.execute(text(statement)).close()
        session.close()


@pytest.mark.parametrize("statement", ["WITH one AS (SELECT 1 AS a) SELECT a FROM one", "/* shop */ SELECT 1"])
def test_a_close_after_reading_loses_nothing(db: Alchemy, place: tuple[str, Any], statement: str) -> None:
    with db.unit_of_work() as session:
        session.execute(text(statement)).all()
        session.close()
