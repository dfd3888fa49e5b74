"""What a unit of work that only reads leaves on its connection, with every driver."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.orm import Session
from support.project.models import Row
from support.raw import raw_of

from celery_alchemy import Alchemy


def begin_by_raw_cursor(session: Session) -> None:
    cursor = raw_of(session).cursor()
    cursor.execute("BEGIN")
    cursor.close()
    session.scalar(select(Row.id).limit(1))


def begin_by_statement(session: Session) -> None:
    sqlite = session.get_bind().dialect.name == "sqlite"
    session.execute(text("BEGIN" if sqlite else "START TRANSACTION"))
    session.scalar(select(Row.id).limit(1))


WRITABLE = {
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
    "mysql": "SET SESSION TRANSACTION READ WRITE",
    "mariadb": "SET SESSION TRANSACTION READ WRITE",
    "sqlite": "PRAGMA query_only = OFF",
}


def let_write(session: Session) -> None:
    session.execute(text(WRITABLE[session.get_bind().dialect.name]))


@pytest.mark.parametrize("leave", [begin_by_raw_cursor, begin_by_statement, let_write])
def test_the_next_one_reads_what_is_there_and_may_not_write(
    db: Alchemy, place: tuple[str, Any], key: str, caplog: pytest.LogCaptureFixture, leave: Callable[[Session], None]
) -> None:
    with db.unit_of_work(read_only=True) as session:
        leave(session)
    assert "unit_of_work() at" in caplog.text
    assert "has changed a connection" in caplog.text
    with db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key, note="new"))
    with contextlib.suppress(Exception), db.unit_of_work(read_only=True) as session:
        session.execute(insert(Row).values(key=key, note="not allowed"))
    with db.unit_of_work(read_only=True) as session:
        assert session.scalars(select(Row.note).where(Row.key == key)).all() == ["new"]
    assert place[1].rows(key) == ["new"]


def test_reading_leaves_nothing(db: Alchemy, key: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        with db.unit_of_work(read_only=True) as session:
            session.scalar(select(Row.id).limit(1))
        with contextlib.suppress(Exception), db.unit_of_work(read_only=True) as session:
            session.execute(text("SELECT * FROM no_such_table"))
    assert "has changed a connection" not in caplog.text
