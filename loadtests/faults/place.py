"""Where a fault happens: a worker, a proxy between it and its database, and what the damage is read off."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import psutil
from celery import Celery
from sqlalchemy import NullPool, create_engine, make_url, text

from ..brokers import Broker, queue_of
from ..databases import DatabaseServer, create_tables
from ..environment import WorkerEnvironment
from ..patterns import OURS
from ..processes import StopStep
from ..proxy import Proxy
from ..replies import Outcome, Reply, ReplyList
from ..rundir import RunDirectory
from ..worker import Worker, running_worker
from ..workloads import Workload
from .tasks import OBJECTS, PROBE, SESSIONS, WRITE

PATIENCE_S = 8.0
"""How long to wait for one more answer. A task here takes a second at most; one that takes longer hangs."""
SETTLE_S = 5.0
STOP_STEPS = (StopStep(signal.SIGTERM, 3.0), StopStep(signal.SIGQUIT, 1.0))
CONCURRENCY = {"prefork": 2, "threads": 4, "gevent": 8, "eventlet": 8, "solo": 1}
WRONG_ANSWERS = {"WrongResult", "AssertionError"}
WATCHED = "celery-alchemy-faults"
"""The `application_name` of the worker's sessions, not of ours."""
_MINE = "datname = current_database()"
BUSY = "state <> 'idle'"
PROBES = 12
"""Enough to find every pool process."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What a fault did in one cell, as numbers of tasks, slots and sessions."""

    tasks: int = 0
    """How many were sent."""
    lost: int = 0
    """Of those that had to end: never answered."""
    wrong: int = 0
    """Succeeded without their lines, failed with them, wrote them twice, or had another task's Session or answer."""
    leaked: int = 0
    """Slots of connection pools that are still taken when nothing runs any more."""
    stuck: int = 0
    """Sessions of the server that are in a statement or a transaction when nothing runs any more."""
    needless: int = 0
    """Failed, though the fault had not hit them."""

    @property
    def any(self) -> bool:
        """Whether there was any."""
        return bool(self.lost or self.wrong or self.leaked or self.stuck or self.needless)

    def __add__(self, other: Self) -> Damage:
        return Damage(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


@dataclass(slots=True)
class Sent:
    """One task, and what became of it."""

    workload: Workload
    task_id: str
    expected: bool = True
    """It has to succeed; otherwise it may also fail."""
    silent: bool = False
    """It ends without an answer (Ignore), and must leave nothing."""
    reply: Reply | None = None


class Place:
    """A worker that is up."""

    def __init__(
        self, pool: str, worker: Worker, proxy: Proxy, environment: WorkerEnvironment, url: str, app: Celery
    ) -> None:
        self.pool = pool
        self.proxy = proxy
        self.together = CONCURRENCY[pool]
        """How many tasks run at one time."""
        self._worker = worker
        self._environment = environment
        self._replies = ReplyList(environment.reply_url, environment.reply_key)
        self._engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self._app = app
        self.sent: dict[str, Sent] = {}

    # -- what faults do ----------------------------------------------------------------------------------------------

    def send(
        self,
        workload: Workload,
        count: int,
        number: int = 0,
        *,
        expected: bool = True,
        silent: bool = False,
        limits: Iterable[float] = (),
        **options: Any,
    ) -> list[Sent]:
        """Send tasks; `limits` are their soft time limits in seconds."""
        given = iter(limits)
        tasks = []
        for _ in range(count):
            task = Sent(workload, uuid.uuid4().hex, expected, silent)
            limit = next(given, None)
            self.sent[task.task_id] = task
            self._app.send_task(
                workload.task_name, [number], task_id=task.task_id, queue=self._environment.queue,
                **({} if limit is None else {"soft_time_limit": limit}), **options,
            )  # fmt: skip
            tasks.append(task)
        return tasks

    def wait(self, tasks: list[Sent]) -> None:
        """Wait until all have answered, or nobody has for a while."""
        deadline = time.monotonic() + PATIENCE_S
        while any(task.reply is None and not task.silent for task in tasks) and time.monotonic() < deadline:
            for message in self._replies.pop(0.2):
                reply = Reply.from_json(message)
                if reply.outcome is not Outcome.RETRY and reply.task_id in self.sent:
                    self.sent[reply.task_id].reply = reply
                    deadline = time.monotonic() + PATIENCE_S

    def run(self, workload: Workload, count: int, number: int = 0, **options: Any) -> None:
        """Send tasks, and wait for them."""
        self.wait(self.send(workload, count, number, **options))

    def sessions(self, condition: str = "true") -> list[int]:
        """Return the server's sessions of this worker for which `condition` holds."""
        sql = f"SELECT pid FROM pg_stat_activity WHERE application_name = '{WATCHED}' AND {_MINE} AND {condition}"  # noqa: S608
        with self._engine.connect() as connection:
            return list(connection.scalars(text(sql)))

    def until_asleep(self, count: int) -> None:
        """Wait until so many tasks sleep on the server; give up quietly, for a broken worker may never get there."""
        _until(lambda: len(self.sessions("query LIKE '%pg_sleep%' AND state = 'active'")) >= count, SETTLE_S)

    def terminate(self) -> None:
        """End all sessions of this worker, as an administrator does."""
        with self._engine.connect() as connection:
            for pid in self.sessions():
                connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        _until(lambda: not self.sessions(), SETTLE_S)

    def kill_pool_processes(self) -> None:
        """Kill prefork's pool processes, as the out-of-memory killer does."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._worker.ready.pid).children():
                os.kill(child.pid, signal.SIGKILL)

    # -- a long load -------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The worker's main process."""
        return self._worker.ready.pid

    def send_unwatched(self, workload: Workload) -> None:
        """Send a task that nobody waits for."""
        self._app.send_task(workload.task_name, [0], queue=self._environment.queue)

    def waiting(self) -> int:
        """Return how many tasks wait in the queue; the broker is a Redis or Valkey server."""
        return self._replies.length_of(self._environment.queue)

    def drain(self) -> int:
        """Take all answers, and return how many tell of a failure."""
        replies = map(Reply.from_json, self._replies.pop(0.001))
        return sum(reply.outcome is Outcome.FAILURE for reply in replies)

    def counts(self) -> dict[str, int]:
        """Return what the tasks of `COUNT` wrote down, by kind, and forget it: of each process the least, for there may
        be tasks beside the one that counts, and of the processes the most."""
        least: dict[tuple[str, str], int] = {}
        with self._engine.connect() as connection:
            sql = "DELETE FROM entry WHERE transfer_id LIKE '%:%:%' RETURNING transfer_id, amount"
            for line, amount in connection.execute(text(sql)):
                kind, pid, _ = line.split(":", 2)
                least[kind, pid] = min(amount, least.get((kind, pid), amount))
        return {
            kind: max((count for (of, _), count in least.items() if of == kind), default=0)
            for kind in (SESSIONS, OBJECTS)
        }

    # -- what is read off --------------------------------------------------------------------------------------------

    def damage(self) -> Damage:
        """Let a few ordinary tasks run, and look at what is left."""
        self.run(WRITE, 2 * self.together, 20)
        tasks = list(self.sent.values())
        leaked = self._leaked()
        _until(lambda: not self.sessions(BUSY), SETTLE_S)
        stuck = len(self.sessions(BUSY))
        lines = self._lines()
        self._replies.close()
        self._engine.dispose()
        return Damage(
            tasks=len(tasks),
            lost=sum(task.reply is None and not task.silent for task in tasks),
            wrong=sum(_is_wrong(task, lines) for task in tasks),
            leaked=leaked,
            stuck=stuck,
            needless=sum(
                task.expected and task.reply is not None and task.reply.outcome is Outcome.FAILURE for task in tasks
            ),
        )

    def _leaked(self) -> int:
        """Return how many slots of connection pools are taken, in all processes, while nothing runs."""
        taken: dict[int, int] = {}
        for _ in range(PROBES):
            (probe,) = self.send(PROBE, 1)
            self.wait([probe])
            if probe.reply is None:
                break  # it hangs: counted among the lost
            taken[probe.reply.pid] = probe.reply.checked_out or 0
            if self.pool != "prefork" or len(taken) == self.together:
                break
        return sum(taken.values())

    def _lines(self) -> Counter[str]:
        with self._engine.connect() as connection:
            rows = connection.execute(text("SELECT transfer_id, count(*) FROM entry GROUP BY transfer_id"))
            return Counter(dict(rows.all()))


def _is_wrong(task: Sent, lines: Counter[str]) -> bool:
    written, wanted = lines[task.task_id], task.workload.transactions
    if task.reply is None:
        return written not in ({0} if task.silent else {0, wanted})
    if task.reply.outcome is not Outcome.SUCCESS:
        wanted = 0
    return written != wanted or bool(task.reply.breach) or task.reply.error_type in WRONG_ANSWERS


def _until(condition: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


@contextmanager
def place(
    run: RunDirectory, server: DatabaseServer, broker: Broker, *, pool: str, pattern: str, strategy: str, in_main: bool
) -> Iterator[Place]:
    """Start a worker with a database, a proxy and a queue of its own; all are gone when the block ends.

    Raises:
        WorkerError: It ended, or was not ready in time.
    """
    name = f"{pool}_{strategy or pattern}_{uuid.uuid4().hex[:6]}".replace("-", "_")
    with ExitStack() as stack:
        url = stack.enter_context(server.fresh_database(run, name))
        create_tables(url, 2)
        proxy = stack.enter_context(contextlib.closing(Proxy(url)))
        watched = proxy.url.update_query_dict({"application_name": WATCHED})
        environment = WorkerEnvironment(
            watched.render_as_string(hide_password=False), broker.url, broker.reply_url,
            f"celery-alchemy-{run.id}-{name}", pattern, in_main,
        )  # fmt: skip
        stack.enter_context(queue_of(run, environment))
        app = Celery("faults", set_as_current=False)
        app.conf.update(environment.celery_settings())
        worker = stack.enter_context(
            running_worker(
                run,
                environment,
                pool=pool,
                concurrency=CONCURRENCY[pool],
                strategy=strategy if pattern == OURS else None,
                name=name,
                stop_steps=STOP_STEPS,
            )
        )
        stack.callback(app.close)
        yield Place(pool, worker, proxy, environment, str(make_url(url).render_as_string(hide_password=False)), app)
