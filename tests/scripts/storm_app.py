"""A Celery app whose workers die: at named points by themselves, and whenever `support.storm_workers` strikes.

Configured by one variable. `way` says how its tasks come to their Session, and what they do about copies; `tasks`,
whether they are `def` or `async def`.
"""

import asyncio
import contextlib
import functools
import itertools
import json
import mmap
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import redis
from celery import Celery, current_task, signals
from celery.worker.request import Request
from sqlalchemy import String, create_engine
from sqlalchemy.orm import Mapped, Session, configure_mappers, mapped_column, registry

from celery_alchemy import Alchemy, AsyncDatabaseTask, DatabaseTask, completed_tasks_table, outbox_table
from celery_alchemy.strategies.features import completed, completed_states, outbox
from celery_alchemy.workers.sending.broker import Broker

config: dict[str, Any] = json.loads(os.environ["STORM_APP"])
OURS = config["way"].startswith("ours")
AWAITS = config["tasks"] == "async def"
app = Celery("storm", broker=config["broker"], backend=config["backend"], set_as_current=False)
app.conf.update(config["settings"])
if OURS:
    app.conf.alchemy_database_url = config["database"]
folder = Path(config["folder"])
sends_directly = False
"""The director sends a message now that does not go through the outbox."""
Base = registry().generate_base()


class Effect(Base):  # type: ignore[misc, valid-type]
    """What a task has done."""

    __tablename__ = "effects"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column("key_", String(64), index=True)
    note: Mapped[str] = mapped_column(String(200))


configure_mappers()
if OURS:
    db = Alchemy(app)
    completed_tasks_table(Base.metadata)
    outbox_table(Base.metadata)


# -- what the director sees --------------------------------------------------------------------------------------------


@functools.cache
def events(pid: int) -> int:
    return os.open(folder / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def say(*words: object) -> None:
    os.write(events(os.getpid()), (" ".join(map(str, words)) + "\n").encode())


class Hand:
    """How many messages, or tasks, this process has in hand: in a file that outlives it."""

    def __init__(self, pid: int) -> None:
        path = folder / f"hand-{pid}"
        path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8)
        self._lock, self._count = threading.Lock(), 0

    def add(self, number: int) -> None:
        with self._lock:
            self._count += number
            self._memory[:] = struct.pack("=q", self._count)


@functools.cache
def hand(pid: int) -> Hand:
    return Hand(pid)


def name_of(headers: Any) -> str:
    """Return what names one message of a task: a retry and a replacement are others."""
    return f"{headers['id']}/{headers.get('replaced_task_nesting') or 0}/{headers.get('retries') or 0}"


# -- how a process dies ------------------------------------------------------------------------------------------------

IN_MAIN = ("before acknowledged", "after acknowledged")
"""Reached by the main process of prefork, and by none of its pool processes."""
POINTS = [f"{when} {what}" for what in ("COMMIT", "result stored", "count") for when in ("before", "after")]
POINTS += ["in the body", "before publish", "after publish"]
if OURS:
    chords = ("chord claimed",) if config["results"] == "alchemy" else ("chord claimed", "chord done")
    own = ("claim", "outbox written", "sending recorded", *chords)
    POINTS += [f"{when} {what}" for what in own for when in ("before", "after")]
AT_MOMENT = 0.4
"""So many die at a random moment, the others at a point."""


class Fate:
    """How this process is to die.

    Args:
        point: Where; "": it is struck.
        visit: The how manieth time that it comes there.
    """

    def __init__(self, point: str = "", visit: int = 0) -> None:
        self.point, self._visit, self._visits = point, visit, itertools.count(1)

    @classmethod
    def drawn(cls, points: Sequence[str], visits: Sequence[int]) -> "Fate":
        return cls() if random.random() < AT_MOMENT else cls(random.choice(points), random.choice(visits))

    def has_come(self) -> bool:
        return next(self._visits) == self._visit


fates: dict[int, Fate] = {}
"""By process: one that has not been born yet lives."""


def born(*, main: bool) -> None:
    """Draw how this process is to die, and say whether it is to be struck."""
    random.seed(os.urandom(8))
    if config["pool"] == "prefork" and main:
        fate = Fate.drawn(IN_MAIN, range(1, 60))
    else:
        fate = Fate.drawn(POINTS if config["pool"] == "prefork" else [*POINTS, *IN_MAIN], (1, 1, 1, 2, 3))
    fates[os.getpid()] = fate
    say("born", os.getpid(), os.getppid(), "main" if main else "child", "point" if fate.point else "moment")


def reached(point: str) -> None:
    """Die here, if this process is to."""
    fate = fates.get(os.getpid())
    if fate is not None and fate.point == point and fate.has_come() and not (folder / "calm").exists():
        say("killed", os.getpid(), point)
        os.kill(os.getpid(), signal.SIGKILL)


def around(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        reached(f"before {what}")
        found = function(*args, **kwargs)
        reached(f"after {what}")
        return found

    return call


def around_before(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Where `function` only makes what is sent later, together with something else."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        reached(f"before {what}")
        return function(*args, **kwargs)

    return call


def follow_script(backend: Any, name: str, what: str) -> None:
    original = getattr(backend, name)  # a cached property
    setattr(backend, name, property(lambda self: around(what, original.__get__(self))))


def follow(engine: Any) -> None:
    engine.dialect.do_commit = around("COMMIT", engine.dialect.do_commit)


def acknowledge(self: Any, *args: Any, **kwargs: Any) -> None:
    reached("before acknowledged")
    say("acknowledges", name_of(self.request_dict))
    _acknowledge(self, *args, **kwargs)
    reached("after acknowledged")
    hand(os.getpid()).add(-1)


def reject(self: Any, *args: Any, **kwargs: Any) -> None:
    _reject(self, *args, **kwargs)
    say("rejected", name_of(self.request_dict))
    hand(os.getpid()).add(-1)


def published(headers: Any = None, body: Any = None, **_: Any) -> None:
    """Tell of messages that the broker alone has, and of those that are in the outbox too."""
    what = "published" if sends_directly or not OURS else "stored"
    say(what, name_of(headers), next(one for one in body[0] if isinstance(one, str) and len(one) == 32))
    if config["worker"] and not OURS:
        reached("after publish")


signals.after_task_publish.connect(published, weak=False)


def look_often(sender: Any, **_: Any) -> None:
    """Let the event loop of Celery 5.7 look at what RabbitMQ has sent: under solo it does so with its next timer, which
    without heartbeats is up to 10 s away (a plain Celery app does the same)."""
    sender.timer.call_repeatedly(0.05, lambda: None)


def follow_all() -> None:
    """Let the points be reached, and the director hear of it."""
    backend: Any = type(app.backend)
    backend.mark_as_done = around("result stored", backend.mark_as_done)
    backend.on_chord_part_return = around("count", backend.on_chord_part_return)
    for script, what in {"_chord_part_return_script": "chord claimed", "_chord_cleanup_script": "chord done"}.items():
        if hasattr(backend, script):
            follow_script(backend, script, what)
    Request.acknowledge, Request.reject = acknowledge, reject
    signals.task_received.connect(lambda request, **_: hand(os.getpid()).add(1), weak=False)
    signals.task_prerun.connect(lambda **_: hand(os.getpid()).add(1), weak=False)
    signals.task_postrun.connect(lambda **_: hand(os.getpid()).add(-1), weak=False)
    if config["pool"] == "prefork":
        signals.worker_process_init.connect(lambda **_: born(main=False), weak=False)
    if config["pool"] == "solo":
        signals.worker_ready.connect(look_often, weak=False)
    signals.worker_ready.connect(lambda **_: (born(main=True), say("ready", os.getpid())), weak=False)
    if not OURS:
        signals.before_task_publish.connect(lambda **_: reached("before publish"), weak=False)
        return
    db.on_engine(follow)
    completed.write = around("claim", completed.write)
    completed.written = around_before("claim", completed.written)
    completed_states.claim = around("chord claimed", completed_states.claim)
    outbox.write = around("outbox written", outbox.write)
    outbox.record = around("sending recorded", outbox.record)
    Broker.publish = around("publish", Broker.publish)  # type: ignore[method-assign]


if config["worker"]:
    _acknowledge, _reject = Request.acknowledge, Request.reject
    follow_all()


# -- the ways ----------------------------------------------------------------------------------------------------------


@functools.cache
def engine(pid: int) -> Any:
    made = create_engine(config["database"])
    follow(made)
    return made


@contextlib.contextmanager
def locked(task: Any) -> Iterator[bool]:
    """The lock of Celery's cookbook, "Ensuring a task is only executed one at a time", in Redis."""
    name, client = f"{config['prefix']}lock:{task.request.id}", redis.Redis.from_url(config["redis"])
    free = client.set(name, 1, nx=True, ex=600)
    try:
        yield bool(free)
    finally:
        if free:
            client.delete(name)
        client.close()


@contextlib.contextmanager
def session_of(task: Any) -> Iterator[Any]:
    if OURS:
        yield task.db
        return
    with Session(engine(os.getpid())) as session, session.begin():
        yield session


def task(name: str) -> Callable[..., Any]:
    """Return what makes a task of a function, in the way that is tried."""

    def make(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            if config["way"] != "lock in Redis":
                return function(self, *args, **kwargs)  # a coroutine, of `async def`
            with locked(self) as free:
                return function(self, *args, **kwargs) if free else None

        base = {"base": AsyncDatabaseTask if AWAITS else DatabaseTask} if OURS else {}
        return app.task(
            name=name, bind=True, shared=False, acks_late=True, reject_on_worker_lost=True, max_retries=3, **base
        )(function if AWAITS else run)

    return make


def shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def effect(got: Any, key: str, note: str) -> Effect:
    """Return the trace of a task: what it was called with."""
    say("runs", f"{os.getpid()} {current_task.request.id}", key, note)
    return Effect(key=key, note=f"{shown(got)}>{note}")


def end(self: Any, key: str, note: str) -> Any:
    """Do what the task of this name does after it has left its trace."""
    if self.name == "retried" and not self.request.retries:
        raise self.retry(countdown=0)
    if self.name == "replaced":
        return self.replace(step.s(note, key, f"{note}+"))
    if self.name == "follows":
        send = step.delay_on_commit if OURS else step.delay
        send(note, key, f"{note}+")
    return note


def run(self: Any, got: Any, key: str, note: str, pause_s: float = 0) -> Any:
    with session_of(self) as session:
        session.add(effect(got, key, note))
        session.flush()
        reached("in the body")
        time.sleep(pause_s)
        if self.name == "retried":
            return end(self, key, note)
    return end(self, key, note)


async def run_awaiting(self: Any, got: Any, key: str, note: str, pause_s: float = 0) -> Any:
    self.db.add(effect(got, key, note))
    await self.db.flush()
    reached("in the body")
    await asyncio.sleep(pause_s)
    return end(self, key, note)


step, *_ = [task(name)(run_awaiting if AWAITS else run) for name in ("step", "replaced", "retried", "follows")]
