"""Tasks that register `db.on_commit` callbacks; each callback says which rows everyone can see when it runs."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import select

from support.project import tools
from support.project.app import app, db, task
from support.project.endings import Boom
from support.project.models import Row


def saying(key: str, what: str = "callback") -> Callable[[], None]:
    return lambda: tools.say(key, [what, tools.committed(key), tools.open_transactions()])


@task()
def callback_after_commit(self: Any, key: str) -> None:
    self.db.add(Row(key=key, note="row"))
    self.db.flush()
    db.on_commit(saying(key))
    tools.say(key, "body ends")


@task()
def callback_then_failure(self: Any, key: str) -> None:
    self.db.add(Row(key=key, note="row"))
    self.db.flush()
    db.on_commit(saying(key))
    raise Boom("on purpose")


@task()
def callback_then_rollback(self: Any, key: str) -> None:
    self.db.add(Row(key=key, note="rolled back"))
    self.db.flush()
    db.on_commit(saying(key, "dropped"))
    self.db.rollback()
    self.db.add(Row(key=key, note="second transaction"))
    db.on_commit(saying(key, "kept"))


@task()
def callback_and_retry(self: Any, key: str) -> None:
    self.db.add(Row(key=key, note="row"))
    self.db.flush()
    db.on_commit(saying(key, f"attempt {self.request.retries}"))
    if self.request.retries == 0:
        raise self.retry(countdown=0)


@task()
def callback_in_savepoint(self: Any, key: str, fails: bool) -> None:
    self.db.add(Row(key=key, note="outer"))
    db.on_commit(saying(key, "outer"))
    try:
        with self.db.begin_nested():
            self.db.add(Row(key=key, note="savepoint"))
            db.on_commit(saying(key, "savepoint"))
            if fails:
                raise Boom("on purpose")
    except Boom:
        pass
    tools.say(key, "body ends")


@task()
def callback_without_transaction(self: Any, key: str) -> None:
    db.on_commit(saying(key))
    tools.say(key, "body ends")


@task()
def callback_after_select(self: Any, key: str) -> None:
    self.db.scalars(select(Row).where(Row.key == key)).all()
    db.on_commit(saying(key))
    tools.say(key, "body ends")


@task()
def callback_and_explicit_commit(self: Any, key: str) -> None:
    self.db.add(Row(key=key, note="row"))
    db.on_commit(saying(key))
    self.db.commit()
    tools.say(key, "after self.db.commit()")


@task()
def callback_fails(self: Any, key: str) -> str:
    self.db.add(Row(key=key, note="row"))

    def broken() -> None:
        raise Boom("in a callback, on purpose")

    db.on_commit(saying(key, "first"))
    db.on_commit(broken)
    db.on_commit(saying(key, "third"))
    return "done"


@task(commit_on_success=False)
def callback_discarded(self: Any, key: str) -> None:
    self.db.scalars(select(Row).where(Row.key == key)).all()
    db.on_commit(saying(key))


@task()
def callback_of_inner_unit(self: Any, key: str) -> None:
    """The inner unit commits, the outer one does not."""
    self.db.add(Row(key=key, note="outer"))
    db.on_commit(saying(key, "outer"))
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="inner"))
        db.on_commit(saying(key, "inner"))
    tools.say(key, "inner unit ended")
    raise Boom("on purpose")


@task()
def callback_with_unit(self: Any, key: str) -> None:
    """A callback may write, in a unit of work of its own."""
    self.db.add(Row(key=key, note="task"))

    def write() -> None:
        with db.unit_of_work() as session:
            session.add(Row(key=key, note="callback"))

    db.on_commit(write)


@app.task
def callback_outside(key: str) -> None:
    """Not a DatabaseTask: there is no unit of work to wait for."""
    db.on_commit(saying(key))
    tools.say(key, "body ends")
