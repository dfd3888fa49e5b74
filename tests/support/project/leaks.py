"""Tasks that check a connection out, and keep it."""

from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

from support.project.app import db, task
from support.project.models import Row

KEPT: list[Connection | Session] = []


@task()
def keep_connection(self: Any, key: str) -> None:
    self.db.add(Row(key=key, note="of the unit of work"))
    connection = db.engine.connect()  # never closed
    connection.execute(Row.__table__.insert(), {"key_": key, "note": "of the kept connection"})
    KEPT.append(connection)


@task()
def keep_session(self: Any, key: str, *, fail: bool = False) -> None:
    session = Session(db.engine)
    session.add(Row(key=key, note="of the kept Session"))
    session.flush()
    KEPT.append(session)
    if fail:
        raise LookupError(key)


@task()
def use_kept(self: Any, key: str) -> str:
    """Use what the last task of this process has kept."""
    self.db.add(Row(key=key, note="of the next task"))
    try:
        KEPT[-1].execute(text("SELECT 1"))
    except Exception as error:
        return type(error).__name__
    return "it still works"


@task()
def forget_kept(self: Any) -> int:
    """Close all of it, late."""
    count = len(KEPT)
    while KEPT:
        KEPT.pop().close()
    return count


@task()
def keep_for_a_while(self: Any, key: str) -> None:
    """Close it in time: nothing to say."""
    connection = db.engine.connect()
    connection.execute(text("SELECT 1"))
    connection.close()
    self.db.add(Row(key=key, note="done"))
