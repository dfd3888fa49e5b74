"""A Celery app whose workers die at random: at named points by themselves, and whenever `support.once_storm` strikes.

Configured by one variable. `way` says how its tasks come to their Session, and what they do about copies.
"""

import contextlib
import functools
import json
import mmap
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis
from celery import Celery, signals
from celery.worker.request import Request
from sqlalchemy import String, create_engine
from sqlalchemy.orm import Mapped, Session, mapped_column, registry

from celery_alchemy import Alchemy, DatabaseTask, completed_tasks_table, outbox_table
from celery_alchemy.strategies.features import completed

config: dict[str, Any] = json.loads(os.environ["STORM_APP"])
app = Celery("storm", broker=config["broker"], backend=config["backend"], set_as_current=False)
app.conf.update(config["settings"])
OURS = config["way"].startswith("ours")
folder = Path(config["folder"])
Base = registry().generate_base()


class Effect(Base):  # type: ignore[misc, valid-type]
    """What a task has done."""

    __tablename__ = "effects"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column("key_", String(64), index=True)
    note: Mapped[str] = mapped_column(String(200))


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


def reached(point: str) -> None:
    """Die here, sometimes."""
    if random.random() < config["chance"] and not (folder / "calm").exists():
        say("killed", f"{os.getpid()} {point}")
        os.kill(os.getpid(), signal.SIGKILL)


def around(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        reached(f"before {what}")
        found = function(*args, **kwargs)
        reached(f"after {what}")
        return found

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
    say("published", name_of(headers), next(one for one in body[0] if isinstance(one, str) and len(one) == 32))
    if config["worker"]:
        reached("after publish")


signals.after_task_publish.connect(published, weak=False)

if config["worker"]:
    random.seed(os.urandom(8))
    backend: Any = type(app.backend)
    backend.mark_as_done = around("result stored", backend.mark_as_done)
    backend.on_chord_part_return = around("count", backend.on_chord_part_return)
    for script, what in {"_chord_part_return_script": "chord claimed", "_chord_cleanup_script": "chord done"}.items():
        if hasattr(backend, script):
            follow_script(backend, script, what)
    completed.write = around("claim", completed.write)
    _acknowledge, _reject = Request.acknowledge, Request.reject
    Request.acknowledge, Request.reject = acknowledge, reject
    signals.before_task_publish.connect(lambda **_: reached("before publish"), weak=False)
    signals.task_received.connect(lambda request, **_: hand(os.getpid()).add(1), weak=False)
    signals.task_prerun.connect(lambda **_: hand(os.getpid()).add(1), weak=False)
    signals.task_postrun.connect(lambda **_: hand(os.getpid()).add(-1), weak=False)
    signals.worker_process_init.connect(lambda **_: random.seed(os.urandom(8)), weak=False)
    signals.worker_ready.connect(lambda **_: say("ready", os.getpid()), weak=False)
    if OURS:
        db.on_engine(follow)


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
                return function(self, *args, **kwargs)
            with locked(self) as free:
                return function(self, *args, **kwargs) if free else None

        base = {"base": DatabaseTask} if OURS else {}
        return app.task(
            name=name, bind=True, shared=False, acks_late=True, reject_on_worker_lost=True, max_retries=3, **base
        )(run)

    return make


def shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def leave(self: Any, got: Any, key: str, note: str, pause_s: float = 0) -> None:
    """Leave a trace of what the task was called with."""
    with session_of(self) as session:
        session.add(Effect(key=key, note=f"{shown(got)}>{note}"))
        session.flush()
        time.sleep(pause_s)
        if note == "t" and not self.request.retries:
            raise self.retry(countdown=0)


@task("step")
def step(self: Any, got: Any, key: str, note: str, pause_s: float = 0) -> str:
    leave(self, got, key, note, pause_s)
    return note


@task("replaced")
def replaced(self: Any, got: Any, key: str, note: str, pause_s: float = 0) -> Any:
    leave(self, got, key, note, pause_s)
    return self.replace(step.s(note, key, f"{note}+"))


@task("retried")
def retried(self: Any, got: Any, key: str, note: str, pause_s: float = 0) -> str:
    leave(self, got, key, note, pause_s)
    return note


@task("follows")
def follows(self: Any, got: Any, key: str, note: str, pause_s: float = 0) -> str:
    leave(self, got, key, note, pause_s)
    send = step.delay_on_commit if OURS else step.delay
    send(note, key, f"{note}+")
    return note
