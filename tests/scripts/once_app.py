"""A Celery app whose worker is killed at named points, as often as Redis says; configured by one variable."""

import functools
import json
import os
import signal
from collections.abc import Callable
from typing import Any

import redis
from celery import Celery
from celery.signals import after_task_publish, before_task_publish, worker_ready
from celery.worker.request import Request
from kombu.transport.redis import QoS
from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column, registry
from support.exactly_once import as_function, done

from celery_alchemy import Alchemy, AsyncDatabaseTask, DatabaseTask, completed_tasks_table, outbox_table
from celery_alchemy.workers.exactly_once import own_chords
from celery_alchemy.workers.sending import received

config: dict[str, Any] = json.loads(os.environ["ONCE_APP"])
app = Celery("once", broker=config["broker"], backend=config["backend"], set_as_current=False)
app.conf.update(config["settings"])
db = Alchemy(app)
Base = registry().generate_base()
completed_tasks_table(Base.metadata)
outbox_table(Base.metadata)


class Effect(Base):  # type: ignore[misc, valid-type]
    """What a task has done."""

    __tablename__ = "rows_"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column("key_", String(64))
    note: Mapped[str] = mapped_column(String(200))


@functools.cache
def client(pid: int) -> Any:
    return redis.Redis.from_url(config["redis"])


def reached(point: str) -> None:
    """Die here if the plan says so."""
    if not config["worker"]:
        return
    connection = client(os.getpid())
    plan = config["prefix"] + "plan:" + point
    if connection.exists(plan) and connection.decr(plan) >= 0:
        connection.incr(config["prefix"] + "killed")
        os.kill(os.getpid(), signal.SIGKILL)


def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        reached(f"before {name}")
        found = function(*args, **kwargs)
        reached(f"after {name}")
        return found

    return call


if config["worker"]:
    received.PAUSE_S = config.get("pause_s") or received.PAUSE_S

    @db.on_engine
    def follow(engine: Any) -> None:
        engine.dialect.do_commit = around("COMMIT", engine.dialect.do_commit)

    backend = type(app.backend)
    backend.mark_as_done = around("done", backend.mark_as_done)
    backend.store_result = around("result", backend.store_result)
    backend.on_chord_part_return = around("count", backend.on_chord_part_return)
    Request.acknowledge = around("acknowledged", Request.acknowledge)
    QoS.append = around("noted", QoS.append)
    own_chords._claim_once = around("claimed", own_chords._claim_once)
    before_task_publish.connect(lambda **_: reached("before publish"), weak=False)
    after_task_publish.connect(lambda **_: reached("after publish"), weak=False)


@worker_ready.connect
def say_ready(**_: Any) -> None:
    client(os.getpid()).rpush(config["prefix"] + "ready", os.getpid())


def shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def task(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a task of a coroutine function that awaits nothing but `done`, in the spelling that is asked for."""
    late, awaits = config.get("late", True), config.get("awaits", False)
    base: Any = AsyncDatabaseTask if awaits else DatabaseTask
    options = {"acks_late": late, "reject_on_worker_lost": late, "max_retries": 3, "shared": False}
    return lambda body: app.task(base=base, bind=True, name=name, **options)(body if awaits else as_function(body))


@task(name="step")
async def step(self: Any, got: Any, key: str, note: str) -> str:
    """Leave a trace of what it was called with."""
    self.db.add(Effect(key=key, note=f"{shown(got)}>{note}"))
    await done(self.db.flush())
    return note


@task(name="replaced")
async def replaced(self: Any, got: Any, key: str, note: str) -> Any:
    """Do something, and leave the rest to another task."""
    self.db.add(Effect(key=key, note=f"{shown(got)}>{note}"))
    return self.replace(step.s(note, key, f"{note}+"))


@task(name="retried")
async def retried(self: Any, got: Any, key: str, note: str) -> Any:
    """Succeed with the second attempt."""
    self.db.add(Effect(key=key, note=f"{shown(got)}>{note}"))
    await done(self.db.flush())
    if not self.request.retries:
        raise self.retry(countdown=0)
    return note


@task(name="follows")
async def follows(self: Any, got: Any, key: str, note: str) -> str:
    """Send what comes next with the COMMIT."""
    self.db.add(Effect(key=key, note=f"{shown(got)}>{note}"))
    step.delay_on_commit(note, key, f"{note}+")
    return note


@task(name="fails")
async def fails(self: Any, got: Any, key: str, note: str) -> str:
    """Leave nothing."""
    self.db.add(Effect(key=key, note=f"{shown(got)}>{note}"))
    await done(self.db.flush())
    raise ValueError(note)


@task(name="mourns")
async def mourns(self: Any, failed: str, key: str, note: str) -> str:
    """Leave a trace of something that has failed."""
    self.db.add(Effect(key=key, note=f"failed>{note}"))
    return note
