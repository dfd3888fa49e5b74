"""The app of the outbox storms: web-like processes that commit, a worker that writes down what it receives, senders.

`OUTBOX_SHOP` in the environment holds JSON: url, broker, queue, exchange, key, seed, settings, and two files, received
and progress.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from celery import Celery
from kombu import Exchange, Queue
from sqlalchemy import event
from sqlalchemy.orm import Session, object_session
from support.outbox_plans import Plan, own_id, plan
from support.project.models import Row

from celery_alchemy import Alchemy, DatabaseTask
from celery_alchemy.strategies.features import outbox

shop: dict[str, Any] = json.loads(os.environ["OUTBOX_SHOP"])
SEED, KEY = shop["seed"], shop["key"]
QUEUE = Queue(shop["queue"], Exchange(shop["exchange"], type="topic"), routing_key="storm")
app = Celery("outbox_shop", broker=shop["broker"])
app.conf.update(
    alchemy_database_url=shop["url"],
    task_queues=[QUEUE],
    task_default_queue=QUEUE.name,
    task_default_exchange=QUEUE.exchange.name,
    task_default_exchange_type="topic",
    task_default_routing_key="storm",
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    worker_hijack_root_logger=False,
    **shop["settings"],
)
db = Alchemy(app)
# What is left by a process that is killed is taken over after that.
outbox.LEASE_S = shop["lease_s"]


@app.task(base=DatabaseTask, bind=True, name="note")
def note(self: DatabaseTask, number: int, place: int) -> None:
    say("received", f"{number} {place} {self.request.id}")


def say(file: str, line: str) -> None:
    """Append a line to a file: in one write, so that whoever is killed leaves whole lines."""
    descriptor = os.open(shop[file], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


class Undone(Exception):
    """Ends a savepoint or a transaction."""


@event.listens_for(Row, "after_insert")
def send_in_the_flush(mapper: object, connection: object, row: Row) -> None:
    session = object_session(row)
    assert session is not None
    for doing in session.info.pop("storm", ()):
        doing.send_from_events()


class Doing:
    """One transaction while it is done."""

    def __init__(self, todo: Plan, session: Session, *, ours: bool) -> None:
        self._todo, self._session = todo, session
        self._options: dict[str, Any] = {} if ours else {"session": session}
        self._ids: dict[int, str] = {}

    def send_all(self) -> None:
        """Register the messages, but for those of mapper events."""
        for place, kind in enumerate(self._todo.parts):
            if kind == "mapper event":
                self._session.info["storm"] = [self]
            elif kind == "undone savepoint":
                with contextlib.suppress(Undone), self._session.begin_nested():
                    self.send(place)
                    raise Undone
            elif kind == "savepoint":
                with self._session.begin_nested():
                    self._ids[place] = self.send(place)
            else:
                self._ids[place] = self.send(place, named=kind == "own id")

    def write(self) -> None:
        """Add the row by which the database tells which transactions it knows of, and the ids that were given."""
        ids = " ".join(f"{place}={task_id}" for place, task_id in self._ids.items())
        self._session.add(Row(key=KEY, note=f"{self._todo.number} {ids}"))

    def send(self, place: int, *, named: bool = False) -> str:
        options = {**self._options, **({"task_id": own_id(SEED, self._todo.number, place)} if named else {})}
        return str(note.apply_async_on_commit((self._todo.number, place), **options).id)

    def send_from_events(self) -> None:
        for place, kind in enumerate(self._todo.parts):
            if kind == "mapper event":
                self.send(place, named=True)


def transact(todo: Plan) -> None:
    """Do one transaction, and end it as planned."""
    with contextlib.suppress(Undone):
        if todo.way == "unit of work, begin() afterwards":
            with db.unit_of_work() as session:
                doing = Doing(todo, session, ours=True)
                doing.send_all()
                with session.begin():
                    doing.write()
                    end(todo, session)
            return
        with opened(todo) as (session, ours):
            doing = Doing(todo, session, ours=ours)
            doing.send_all()
            doing.write()
            end(todo, session)


def end(todo: Plan, session: Session) -> None:
    """End the transaction, unless the block that it is in is to commit it."""
    if todo.ending == "raise":
        raise Undone
    if todo.ending == "rollback":
        session.rollback()
    elif todo.way in {"unit of work, commit()", "Session"}:
        session.commit()


@contextlib.contextmanager
def opened(todo: Plan) -> Iterator[tuple[Session, bool]]:
    """Open the Session of a transaction; say too whether it is that of a unit of work."""
    if todo.way.startswith("unit of work"):
        with db.unit_of_work() as session:
            yield session, True
    elif todo.way == "Session":
        with Session(db.engine) as session:
            yield session, False
    else:
        with Session(db.engine) as session, session.begin():
            yield session, False


def web(first: int, count: int) -> None:
    """Do transactions until killed; what is begun and what has ended is written down.

    Every second process leaves the sending to the senders.
    """
    app.conf.alchemy_outbox = "relay" if first // count % 2 else True
    for number in range(first, first + count):
        say("progress", f"begun {number}")
        try:
            transact(plan(SEED, number))
        except Exception as error:
            say("progress", f"failed {number} {type(error).__name__}")
            print(f"transaction {number}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            time.sleep(0.05)  # a database that is away would be asked thousands of times
        else:
            say("progress", f"ended {number}")


def worker() -> None:
    app.worker_main(
        ["-q", "worker", "-P", "solo", "-l", "WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat",
         "-n", f"storm-{os.getpid()}@here"]
    )  # fmt: skip


def sender() -> None:
    from celery.bin.celery import main

    sys.argv[:] = ["celery", "-A", "scripts.outbox_shop", "alchemy", "outbox", "run", "--interval-s", "0.2"]
    main()
