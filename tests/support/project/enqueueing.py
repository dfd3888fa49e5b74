"""Tasks that send other tasks: after the commit, or at once."""

from typing import Any

from celery import chain, chord, group
from kombu.exceptions import EncodeError

from celery_alchemy import CurrentSession, DatabaseTask
from support.project import tools
from support.project.app import app, db, task
from support.project.endings import Boom
from support.project.models import Row


@app.task
def receive(key: str, what: str = "received") -> str:
    """Say which rows everyone can see when this message has arrived."""
    tools.say(key, [what, tools.committed(key)])
    return what


@app.task
def receive_all(whats: list[str], key: str) -> None:
    tools.say(key, ["all", sorted(whats)])


@task()
def received_by_database_task(self: Any, key: str, what: str) -> None:
    tools.say(key, [what, tools.committed(key), self.request.id])


@task()
def send_on_commit(self: Any, key: str, ending: str = "return") -> str:
    """Return the id that the task will have."""
    self.db.add(Row(key=key, note="row"))
    self.db.flush()
    result = received_by_database_task.delay_on_commit(key, what="sent")
    tools.say(key, "body ends")
    if ending == "raise":
        raise Boom("on purpose")
    if ending == "retry" and self.request.retries == 0:
        raise self.retry(countdown=0)
    if ending == "rollback":
        self.db.rollback()
    return str(result.id)


@task()
def send_in_savepoint(self: Any, key: str) -> None:
    """Only what was sent in the savepoint that is undone is dropped."""
    self.db.add(Row(key=key, note="row"))
    received_by_database_task.delay_on_commit(key, "outer")
    try:
        with self.db.begin_nested():
            received_by_database_task.delay_on_commit(key, "undone")
            raise Boom("on purpose")
    except Boom:
        pass
    with self.db.begin_nested():
        received_by_database_task.delay_on_commit(key, "kept")


@task()
def send_what_changes(self: Any, key: str) -> None:
    what = ["as it was"]
    receive_list.apply_async_on_commit((key,), {"whats": what})
    what.append("changed")


@task()
def receive_list(self: Any, key: str, whats: list[str]) -> None:
    tools.say(key, whats)


@task()
def send_nonsense(self: Any, key: str) -> list[str]:
    """What cannot be sent fails where it is asked for."""
    errors = []
    for arguments in ((key,), (key, object())):
        try:
            received_by_database_task.delay_on_commit(*arguments)
        except (TypeError, EncodeError) as error:
            errors.append(type(error).__name__)
    return errors


@task()
def send_by_setting(self: Any, key: str, how: str, ending: str = "return") -> None:
    """With alchemy_enqueue_on_commit all of these wait."""
    self.db.add(Row(key=key, note="row"))
    self.db.flush()
    receiver = receive.s(key)
    ways: dict[str, Any] = {
        "delay": lambda: receive.delay(key),
        "apply_async": lambda: receive.apply_async((key,), countdown=0),
        "send_task": lambda: app.send_task("receive", (key,)),
        "signature": receiver.delay,
        "group": group(receiver, receiver).delay,
        "chain": chain(receiver, receive.si(key, "second")).delay,
        "chord": chord([receive.si(key, "one"), receive.si(key, "two")], receive_all.s(key)).delay,
        "now": lambda: receive.apply_async((key,), enqueue_on_commit=False),
        "task says now": lambda: receive_now.delay(key),
    }
    ways[how]()
    tools.say(key, "body ends")
    if ending == "raise":
        raise Boom("on purpose")


@app.task(enqueue_on_commit=False)
def receive_now(key: str) -> None:
    tools.say(key, ["received", tools.committed(key)])


@app.task(enqueue_on_commit=True)
def receive_later(key: str) -> None:
    tools.say(key, ["received", tools.committed(key)])


@task()
def send_to_one_that_waits(self: Any, key: str, asked: bool | None = None) -> None:
    self.db.add(Row(key=key, note="row"))
    self.db.flush()
    options = {} if asked is None else {"enqueue_on_commit": asked}
    receive_later.apply_async((key,), **options)
    tools.say(key, "body ends")


@task()
def send_outside_and_inside(self: Any, key: str) -> None:
    """A block inside the task has a COMMIT of its own, and that is waited for."""
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="block"))
        received_by_database_task.delay_on_commit(key, "of the block")
    tools.say(key, "block ended")


@task()
def retry_with_the_setting(self: Any, key: str) -> str:
    """Celery's own messages never wait: this one would wait for a unit of work that is rolled back."""
    self.db.add(Row(key=key, note=f"attempt {self.request.retries}"))
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return "second"


@task()
def replace_with_the_setting(self: Any, key: str) -> Any:
    self.db.add(Row(key=key, note="replaced"))
    raise self.replace(receive.si(key, "replacement"))


@app.task
def eager_link(key: str) -> None:
    """Run a task eagerly inside a unit of work: its link is a message of Celery's own, and is sent at once."""
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="row"))
        session.flush()
        receive.apply((key, "eager"), link=receive.si(key, "link"))
        tools.say(key, "block ends")


# -- the Session as an argument --------------------------------------------------------------------------------------


@task()
def insert_by_argument(self: Any, key: str, session: CurrentSession, note: str = "default") -> bool:
    session.add(Row(key=key, note=note))
    return session is self.db


@app.task(base=DatabaseTask)
def call_one_with_an_argument(key: str, session: CurrentSession) -> bool:
    session.add(Row(key=key, note="caller"))
    return bool(insert_by_argument(key, note="called"))
