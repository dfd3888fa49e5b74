"""Tasks that commit by themselves, each in another way, while the test holds the COMMIT."""

import os
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from support.project import tools
from support.project.app import db, task
from support.project.models import Row

HELD = text("INSERT INTO held_ (key_) VALUES (:key)")


def write(session: Any, key: str) -> None:
    session.add(Row(key=key, note="committed"))
    session.flush()
    session.execute(HELD, {"key": key})


def write_core(connection: Any, key: str) -> None:
    connection.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, 'committed')"), {"key": key})
    connection.execute(HELD, {"key": key})


def commit(task: Any, key: str) -> None:
    write(task.db, key)
    task.db.commit()


def begin(task: Any, key: str) -> None:
    with task.db.begin():
        write(task.db, key)


def transaction(task: Any, key: str) -> None:
    transaction = task.db.begin()
    write(task.db, key)
    transaction.commit()


def get_transaction(task: Any, key: str) -> None:
    write(task.db, key)
    task.db.get_transaction().commit()


def savepoint(task: Any, key: str) -> None:
    """The savepoint is released, and the unit of work commits."""
    with task.db.begin_nested():
        write(task.db, key)


def callback(task: Any, key: str) -> None:
    """Something waits for the COMMIT."""
    db.on_commit(lambda: tools.say(key, "on_commit"))
    with task.db.begin():
        write(task.db, key)


def unit(task: Any, key: str) -> None:
    with db.unit_of_work() as session:
        write(session, key)


def applied(task: Any, key: str) -> None:
    """A task run here and now has a unit of work of its own."""
    write_held.apply((key,)).get(disable_sync_subtasks=False)


def called(task: Any, key: str) -> None:
    """A task called like a function commits the unit of work that it has joined."""
    write_and_commit(key)


def of_session(task: Any, key: str) -> None:
    connection = task.db.connection()
    write_core(connection, key)
    connection.commit()
    task.db.rollback()  # SQLAlchemy wants it: the Session knows nothing of that COMMIT


def closed(task: Any, key: str) -> None:
    """As in a hand-written task."""
    write(task.db, key)
    task.db.commit()
    task.db.close()


def core(task: Any, key: str) -> None:
    with db.engine.begin() as connection:
        write_core(connection, key)


def core_commit(task: Any, key: str) -> None:
    with db.engine.connect() as connection:
        write_core(connection, key)
        connection.commit()


def own_session(task: Any, key: str) -> None:
    with Session(db.engine) as session, session.begin():
        write(session, key)


def factory(task: Any, key: str) -> None:
    with sessionmaker(db.engine).begin() as session:
        write(session, key)


WAYS: dict[str, Callable[[Any, str], None]] = {
    way.__name__: way
    for way in (
        *(commit, begin, transaction, get_transaction, savepoint, callback, unit, applied, called, of_session),
        *(closed, core, core_commit, own_session, factory),
    )
}


@task()
def write_held(self: Any, key: str) -> None:
    write(self.db, key)


@task()
def write_and_commit(self: Any, key: str) -> None:
    write(self.db, key)
    self.db.commit()


@task()
def commit_held(self: Any, key: str, way: str, goes_on: bool) -> str:
    """Commit in one way, with a time limit in the COMMIT; then return, or do something else for long."""
    tools.say(key, os.getpid())
    WAYS[way](self, key)
    deadline = time.monotonic() + 20
    while goes_on and time.monotonic() < deadline:
        sum(range(1000))
    return "committed"
