"""Tasks that would lose work: by closing their Session, by what they return, by what fails after their COMMIT."""

from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from support.project import tools
from support.project.app import app, db, task
from support.project.models import Row


@task()
def close_in_finally(self: Any, key: str) -> None:
    try:
        self.db.add(Row(key=key))
    finally:
        self.db.close()


@task()
def close_with_a_block(self: Any, key: str) -> None:
    with self.db as session:
        session.add(Row(key=key))
        session.flush()


@task()
def close_by_remove(self: Any, key: str) -> None:
    db.session.add(Row(key=key))
    db.session.remove()  # type: ignore[attr-defined]


@task()
def close_and_go_on(self: Any, key: str) -> None:
    """What comes after the close must not be committed alone."""
    self.db.add(Row(key=key, note="lost"))
    self.db.close()
    self.db.add(Row(key=key, note="half"))
    self.db.commit()


@task()
def close_after_commit(self: Any, key: str) -> None:
    self.db.add(Row(key=key, note="first"))
    self.db.commit()
    self.db.close()
    self.db.add(Row(key=key, note="second"))


@task()
def close_in_a_block_inside(self: Any, key: str) -> None:
    self.db.add(Row(key=key, note="outer"))
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="inner"))
        session.close()


@task()
def return_model(self: Any, key: str) -> Any:
    row = Row(key=key)
    self.db.add(row)
    self.db.flush()
    return {"rows": [row]}


@task(ignore_result=True)
def return_model_to_nobody(self: Any, key: str) -> Any:
    row = Row(key=key)
    self.db.add(row)
    return row


@task()
def listener_fails(self: Any, key: str, event_name: str, by_hand: bool) -> str:
    def fail(session: Any, transaction: Any = None) -> None:
        if transaction is None or transaction.parent is None:  # each flush has a transaction of its own
            raise ValueError("a listener of the user's")

    event.listen(self.db, event_name, fail)
    self.db.add(Row(key=key))
    db.on_commit(lambda: tools.say(key, "callback"))
    if by_hand:
        self.db.commit()
    return "returned"


@task()
def leave_autocommit(self: Any) -> None:
    raw = db.engine.raw_connection()
    raw.driver_connection.autocommit = True
    raw.close()


@app.task
def plain_task_that_closes(key: str) -> None:
    """Outside a unit of work a Session is its owner's."""
    with Session(db.engine) as session:
        session.add(Row(key=key))
        session.commit()
