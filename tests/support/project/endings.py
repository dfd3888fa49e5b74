"""One task per way in which a task can end."""

import contextlib
import time
from typing import Any

from celery import chord
from celery.exceptions import Ignore, Reject
from sqlalchemy import insert as core_insert
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from celery_alchemy import DatabaseTask
from support.project.app import app, db, task
from support.project.models import Child, Counter, Row, User


class Boom(Exception):
    """What a task raises that fails on purpose."""


class Abort(BaseException):
    """What a task raises that is torn down: not an Exception."""


@app.task(base=DatabaseTask, bind=True)
def create(self: DatabaseTask, name: str):
    """The recipe, unchanged."""
    self.db.add(User(name=name))
    self.db.commit()


@task()
def insert(self: Any, key: str, note: str = "inserted") -> None:
    self.db.add(Row(key=key, note=note))


@task()
def read(self: Any, key: str) -> list[str]:
    return list(self.db.scalars(select(Row.note).where(Row.key == key).order_by(Row.id)))


@task()
def fail(self: Any, key: str) -> None:
    self.db.add(Row(key=key))
    self.db.flush()
    raise Boom("on purpose")


@task(commit_on_success=False)
def discard_flush(self: Any, key: str) -> None:
    self.db.add(Row(key=key))
    self.db.flush()


@task(commit_on_success=False)
def discard_core(self: Any, key: str) -> None:
    self.db.execute(core_insert(Row).values(key=key, note="core"))


@task(commit_on_success=False)
def discard_text(self: Any, key: str) -> None:
    self.db.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, 'text')"), {"key": key})


@task(commit_on_success=False)
def discard_pending(self: Any, key: str) -> None:
    """Never flushed by the task itself."""
    self.db.add(Row(key=key))


@task(commit_on_success=False)
def discard_nothing(self: Any, key: str) -> int:
    return len(self.db.scalars(select(Row).where(Row.key == key)).all())


@task(commit_on_success=False)
def commit_by_hand(self: Any, key: str) -> None:
    self.db.add(Row(key=key, note="by hand"))
    self.db.commit()


@task()
def swallow_flush_error(self: Any, key: str, name: str) -> str:
    """`name` exists already: the flush fails, and nobody hears of it."""
    self.db.add(Row(key=key))
    self.db.flush()
    with contextlib.suppress(IntegrityError):
        self.db.add(User(name=name))
        self.db.flush()
    return "as if nothing had happened"


@task()
def swallow_statement_error(self: Any, key: str, name: str) -> str:
    """The same in SQL: the Session does not know that PostgreSQL has aborted the transaction."""
    self.db.add(Row(key=key))
    self.db.flush()
    with contextlib.suppress(IntegrityError):
        self.db.execute(text("INSERT INTO users (name) VALUES (:name)"), {"name": name})
    return "as if nothing had happened"


@task()
def swallow_and_roll_back(self: Any, key: str, name: str) -> None:
    self.db.add(User(name=name))
    try:
        self.db.flush()
    except IntegrityError:
        self.db.rollback()
    self.db.add(Row(key=key, note="after rollback"))


@task()
def swallow_in_savepoint(self: Any, key: str, name: str) -> None:
    self.db.add(Row(key=key, note="around the savepoint"))
    with contextlib.suppress(IntegrityError), self.db.begin_nested():
        self.db.add(User(name=name))


def first_attempt(self: Any, key: str) -> None:
    """Leave a row and a row lock behind."""
    self.db.add(Row(key=key, note="first attempt"))
    self.db.scalars(select(Counter).where(Counter.key == key).with_for_update()).one()
    self.db.flush()


def second_attempt(self: Any, key: str) -> dict[str, Any]:
    """Take the row lock at once, or fail; look for rows of the first attempt."""
    self.db.scalars(select(Counter).where(Counter.key == key).with_for_update(nowait=True)).one()
    notes = list(self.db.scalars(select(Row.note).where(Row.key == key)))
    self.db.add(Row(key=key, note="second attempt"))
    return {"attempt": self.request.retries, "first attempt left": notes}


@task()
def retry_once(self: Any, key: str) -> dict[str, Any]:
    if self.request.retries == 0:
        first_attempt(self, key)
        raise self.retry(countdown=0, max_retries=1)
    return second_attempt(self, key)


@task()
def retry_after_error(self: Any, key: str) -> dict[str, Any]:
    """`self.retry(exc=...)` from an except block, as in Celery's documentation."""
    if self.request.retries == 0:
        first_attempt(self, key)
        try:
            raise Boom("on purpose")
        except Boom as error:
            raise self.retry(exc=error, countdown=0, max_retries=1) from error
    return second_attempt(self, key)


@task(autoretry_for=(Boom,), retry_backoff=False, default_retry_delay=0, retry_kwargs={"max_retries": 1})
def autoretry_once(self: Any, key: str) -> dict[str, Any]:
    if self.request.retries == 0:
        first_attempt(self, key)
        raise Boom("on purpose")
    return second_attempt(self, key)


@task()
def retry_for_ever(self: Any, key: str) -> None:
    self.db.add(Row(key=key))
    self.db.flush()
    raise self.retry(exc=Boom("on purpose"), countdown=0, max_retries=1)


@task()
def replace(self: Any, key: str) -> None:
    self.db.add(Row(key=key, note="before replace"))
    raise self.replace(read.si(key))


@task()
def ignore(self: Any, key: str) -> None:
    self.db.add(Row(key=key))
    self.db.flush()
    raise Ignore


@task()
def reject(self: Any, key: str) -> None:
    self.db.add(Row(key=key))
    self.db.flush()
    raise Reject("on purpose", requeue=False)


@app.task
def start_chord(key: str) -> str:
    """Two tasks, then one that sees what they wrote."""
    header = [insert.si(key, note) for note in ("first", "second")]
    return str(chord(header)(read.si(key)).id)


@app.task(base=DatabaseTask)
def note_error(request: Any, error: BaseException, traceback: Any) -> None:
    """An error callback: Celery calls it like a function, in the process that handles the failure."""
    db.session.add(Row(key=request.args[0], note=f"errback {type(error).__name__}"))


@task()
def lose_a_conflict(self: Any, key: str) -> None:
    """Fail as the server lets one of two transactions fail; PostgreSQL."""
    self.db.add(Row(key=key))
    self.db.execute(text("DO $$ BEGIN RAISE EXCEPTION 'of two' USING ERRCODE = '40001'; END $$"))


@task()
def fail_slowly(self: Any, key: str) -> None:
    """Killed by a hard time limit."""
    self.db.add(Row(key=key))
    self.db.flush()
    time.sleep(60)


@task()
def begin_by_hand(self: Any, key: str) -> None:
    """SQLAlchemy's own idiom."""
    with self.db.begin():
        self.db.add(Row(key=key, note="begun by hand"))
    with self.db.begin():
        self.db.add(Row(key=key, note="begun again"))


@task()
def close_by_hand(self: Any, key: str) -> None:
    """As in a hand-written task: `commit()`, `finally: close()`."""
    try:
        self.db.add(Row(key=key, note="committed by hand"))
        self.db.commit()
    finally:
        self.db.close()


@task()
def orphan(self: Any, key: str) -> str:
    """Only the COMMIT fails: the foreign key is deferred."""
    self.db.add(Row(key=key))
    self.db.add(Child(parent_id=-1))
    return "as if nothing had happened"


@task(autoretry_for=(IntegrityError,), default_retry_delay=0, retry_kwargs={"max_retries": 1})
def orphan_once(self: Any, key: str) -> int:
    self.db.add(Row(key=key, note=f"attempt {self.request.retries}"))
    if self.request.retries == 0:
        self.db.add(Child(parent_id=-1))
    return int(self.request.retries)


@task()
def abort(self: Any, key: str) -> None:
    self.db.add(Row(key=key))
    self.db.flush()
    raise Abort("on purpose")


@task()
def leave(self: Any, key: str) -> None:
    self.db.add(Row(key=key))
    self.db.flush()
    raise SystemExit(3)
