"""Tasks to be looked at while they run."""

import threading
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from support.project import tools
from support.project.app import db, task
from support.project.models import Row


@task()
def wait_in_transaction(self: Any, key: str, parties: int) -> None:
    self.db.add(Row(key=key, note="row"))
    self.db.flush()
    self.db.execute(text("SELECT 'the last one' AS secret"))
    tools.barrier(key, parties)


@task()
def wait_in_statement(self: Any, key: str, seconds: float) -> None:
    self.db.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})


@task()
def wait_for_a_lock(self: Any, number: int) -> None:
    self.db.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})


@task()
def wait_after_commit(self: Any, key: str, parties: int) -> None:
    self.db.add(Row(key=key, note="row"))
    self.db.commit()
    tools.barrier(key, parties)


@task()
def wait_nested(self: Any, key: str, parties: int) -> None:
    self.db.execute(text("SELECT 1"))
    with db.unit_of_work() as session:
        session.execute(text("SELECT 2"))
        session.execute(text("SELECT 3"))
        tools.barrier(key, parties)


@task()
def server_pid(self: Any) -> int:
    return int(self.db.scalar(text("SELECT pg_backend_pid()")))


@task()
def keep_a_connection(self: Any) -> None:
    tools.kept = db.engine.connect()  # type: ignore[attr-defined]
    tools.kept.execute(text("SELECT 1"))  # type: ignore[attr-defined]


@task()
def leave_a_helper(self: Any, kind: str, key: str, parties: int) -> None:
    """Start a thread, a greenlet under gevent and eventlet, that goes on when the task has ended."""
    self.db.execute(text("SELECT 1"))
    threading.Thread(target=HELPERS[kind], args=(key, parties), name=f"helper-{key}").start()


def in_a_unit_of_work(key: str, parties: int) -> None:
    with db.unit_of_work() as session:
        session.execute(text("SELECT 'a helper'"))
        tools.barrier(key, parties)


def on_a_connection(key: str, parties: int) -> None:
    with db.engine.connect() as connection:
        connection.execute(text("SELECT 'a helper'"))
        tools.barrier(key, parties)


def in_a_session(key: str, parties: int) -> None:
    with Session(db.engine) as session:
        session.execute(text("SELECT 'a helper'"))
        tools.barrier(key, parties)


def after_its_transaction(key: str, parties: int) -> None:
    with db.engine.connect() as connection:
        connection.execute(text("SELECT 'a helper'"))
        connection.rollback()
        tools.barrier(key, parties)


HELPERS = {
    one.__name__: one for one in (in_a_unit_of_work, on_a_connection, in_a_session, after_its_transaction)
}  # fmt: skip
