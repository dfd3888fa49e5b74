"""Where a fault happens: a worker, a proxy between it and its database, what the damage is read off; and the faults."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import psutil

from ..services.harness import LoadWorker, Sent, Services, load_worker
from ..services.processes import StopStep
from ..services.proxy import Proxy
from ..tasks.patterns import ASYNCIO, POOLS
from ..tasks.replies import Outcome, Reply
from ..tasks.workloads import Workload
from .tasks import IGNORE, MANY, OBJECTS, ONCE, PROBE, RETRY, SESSIONS, SURELY, WRITE

PATIENCE_S = 8.0
"""How long to wait for one more answer. A task here takes a second at most; one that takes longer hangs."""
LONGEST_S = 60.0  # For tasks that are waited for together: one that retries for ever answers for ever
SETTLE_S = 5.0
STOP_STEPS = (StopStep(signal.SIGTERM, 3.0), StopStep(signal.SIGQUIT, 1.0))
CONCURRENCY = {"prefork": 2, "threads": 4, "gevent": 8, "eventlet": 8, "solo": 1, ASYNCIO: 8}
WRONG_ANSWERS = {"WrongResult", "AssertionError"}
WATCHED = "celery-alchemy-faults"  # The `application_name` of the worker's sessions, not of ours
BUSY = "state <> 'idle'"
NONE = "none"
PROBES = 12  # Enough to find every pool process


@dataclass(frozen=True, slots=True)
class Damage:
    """What a fault did in one cell, as numbers of tasks, slots and sessions."""

    tasks: int = 0  # How many were sent
    lost: int = 0  # Of those that had to end: never answered
    wrong: int = 0
    """Succeeded without their lines, failed with them, wrote them twice, or had another task's Session or answer."""
    leaked: int = 0  # Slots of connection pools that are still taken when nothing runs any more
    stuck: int = 0  # Sessions of the server that are in a statement or a transaction when nothing runs any more
    needless: int = 0  # Failed, though the fault had not hit them

    @property
    def any(self) -> bool:
        """Whether there was any."""
        return str(self) != NONE

    def __add__(self, other: Self) -> Damage:
        return Damage(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def __str__(self) -> str:
        numbers = {name: getattr(self, name) for name in self.__slots__ if name != "tasks"}
        return ", ".join(f"{number} {name}" for name, number in numbers.items() if number) or NONE


@dataclass(slots=True, kw_only=True)
class Watched(Sent):
    """One task, and what has to become of it."""

    workload: Workload
    expected: bool = True  # It has to succeed; otherwise it may also fail
    silent: bool = False  # It ends without an answer (Ignore), and must leave nothing

    @property
    def reply(self) -> Reply | None:
        return self.final[-1] if self.final else None

    def is_wrong(self, lines: Counter[str]) -> bool:
        """Return whether it left other lines than it should, or had what was not its own."""
        written, wanted = lines[self.task_id], self.workload.transactions
        if self.reply is None:
            return written not in ({0} if self.silent else {0, wanted})
        if self.reply.outcome is not Outcome.SUCCESS:
            wanted = 0
        return written != wanted or bool(self.reply.breach) or self.reply.error_type in WRONG_ANSWERS


class Place(LoadWorker):
    """A worker that is up."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.watched: list[Watched] = []
        self.together: int = CONCURRENCY[self.pool]  # How many tasks run at one time
        self.pid: int = self.worker.pid  # The worker's main process

    def send(
        self, workload: Workload, count: int, number: int = 0, *, expected: bool = True, silent: bool = False,
        limits: Sequence[float] = (), **options: Any,
    ) -> list[Watched]:  # fmt: skip
        """Send tasks; `limits` are their soft time limits in seconds."""
        tasks = []
        for index in range(count):
            limit: dict[str, Any] = {"soft_time_limit": limits[index]} if limits else {}
            task = Watched(number=number, workload=workload, expected=expected, silent=silent)
            tasks.append(self.post(workload.task_name, task, **limit, **options))
        self.watched += tasks
        return tasks

    def wait(self, tasks: Iterable[Watched]) -> None:
        """Wait until all have ended, or nobody has answered for a while, or it takes too long."""
        awaited, end = [task for task in tasks if not task.silent], time.monotonic() + LONGEST_S
        over = lambda: time.monotonic() > end or all(task.final for task in awaited)  # noqa: E731
        self.collect(awaited, over=over, patience_s=PATIENCE_S)

    def run_all(self, workload: Workload, count: int, number: int = 0, **options: Any) -> None:
        """Send tasks, and wait for them."""
        self.wait(self.send(workload, count, number, **options))

    def sessions(self, condition: str = "true") -> list[int]:
        """Return the server's sessions of this worker for which `condition` holds."""
        mine = "datname = current_database() AND application_name = :name"
        found = self.rows(f"SELECT pid FROM pg_stat_activity WHERE {mine} AND {condition}", name=WATCHED)  # noqa: S608
        return [pid for (pid,) in found]

    def until_asleep(self, count: int) -> None:
        """Wait until so many tasks sleep on the server; give up quietly, for a broken worker may never get there."""
        _until(lambda: len(self.sessions("query LIKE '%pg_sleep%' AND state = 'active'")) >= count, SETTLE_S)

    def terminate(self) -> None:
        """End all sessions of this worker, as an administrator does."""
        for pid in self.sessions():
            self.rows("SELECT pg_terminate_backend(:pid)", pid=pid)
        _until(lambda: not self.sessions(), SETTLE_S)

    def kill_pool_processes(self) -> None:
        """Kill prefork's pool processes, as the out-of-memory killer does."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children():
                os.kill(child.pid, signal.SIGKILL)

    def counts(self) -> dict[str, int]:
        """Return what the tasks of `COUNT` wrote down, by kind, and forget it: of each process the least, for there may
        be tasks beside the one that counts, and of the processes the most."""
        least: dict[str, dict[str, int]] = {SESSIONS: {}, OBJECTS: {}}
        for line, amount in self.rows("DELETE FROM entry WHERE transfer_id LIKE '%:%:%' RETURNING transfer_id, amount"):
            kind, pid, _ = line.split(":", 2)
            least[kind][pid] = min(amount, least[kind].get(pid, amount))
        return {kind: max(counts.values(), default=0) for kind, counts in least.items()}

    def damage(self) -> Damage:
        """Let a few ordinary tasks run, and look at what is left."""
        self.run_all(WRITE, 2 * self.together, 20)
        tasks, leaked = list(self.watched), self._leaked()
        _until(lambda: not self.sessions(BUSY), SETTLE_S)
        stuck = len(self.sessions(BUSY))
        lines = Counter(dict(self.rows("SELECT transfer_id, count(*) FROM entry GROUP BY transfer_id")))
        failed = [task for task in tasks if task.reply is not None and task.reply.outcome is Outcome.FAILURE]
        return Damage(
            tasks=len(tasks),
            lost=sum(task.reply is None and not task.silent for task in tasks),
            wrong=sum(task.is_wrong(lines) for task in tasks),
            leaked=leaked,
            stuck=stuck,
            needless=sum(task.expected for task in failed),
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

    def send_unwatched(self, workload: Workload) -> None:
        """Send a task that nobody waits for."""
        self.sent.pop(self.post(workload.task_name, Sent(0)).task_id)

    def waiting(self) -> int:
        """Return how many tasks wait in the queue; the broker is a Redis or Valkey server."""
        return self.replies.length_of(self.environment.queue)

    def drain(self) -> int:
        """Take all answers, and return how many tell of a failure."""
        return sum(Reply.from_json(message).outcome is Outcome.FAILURE for message in self.replies.pop(0.001))


def _until(condition: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def place(
    services: Services, pool: str, pattern: str, strategy: str = "", *, in_main: bool = False, proxied: bool = True
) -> AbstractContextManager[Place]:
    """Start a worker with a database, a queue, and a proxy if wanted, of its own; all are gone when the block ends.

    Raises:
        WorkerError: It ended, or was not ready in time.
    """
    return load_worker(
        services, pool=pool, kind=Place, pattern=pattern, concurrency=CONCURRENCY[pool], strategy=strategy or None,
        name=f"{pool}-{strategy or pattern}", accounts=2, proxied=Proxy if proxied else None, application_name=WATCHED,
        used_in_main=in_main, stop_steps=STOP_STEPS,
    )  # fmt: skip


SLEEP_MS = 700
GONE_S = 1.5
LONGEST_MS = 60_000
LIMITED = 60


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong."""

    name: str
    summary: str  # One sentence for people
    cause: Callable[[Place, random.Random], object]
    pools: tuple[str, ...] = (*POOLS, ASYNCIO)
    in_main: bool = False  # The main process uses the database before it forks


def _nothing(place: Place, chance: random.Random) -> None:
    place.run_all(WRITE, 6 * place.together, 20)


def _ignored(place: Place, chance: random.Random) -> None:
    place.run_all(IGNORE, 12, silent=True)
    place.run_all(WRITE, 2 * place.together)


def _idle(place: Place, chance: random.Random) -> None:
    place.run_all(WRITE, 2 * place.together, 50)
    place.terminate()
    place.run_all(WRITE, 2 * place.together, 20)


def _while_busy(strike: Callable[[Place], object]) -> Callable[[Place, random.Random], None]:
    """Return a cause that strikes while every slot is in a statement, and as many tasks wait behind."""

    def cause(place: Place, chance: random.Random) -> None:
        struck = place.send(WRITE, place.together, SLEEP_MS, expected=False)
        waiting = place.send(WRITE, place.together, 20)
        place.until_asleep(place.together)
        strike(place)
        place.wait([*struck, *waiting])

    return cause


def _gone(place: Place, chance: random.Random) -> None:
    tasks = place.send(SURELY, place.together, SLEEP_MS)
    place.until_asleep(place.together)
    place.proxy.refuse()
    place.proxy.cut()
    tasks += place.send(SURELY, place.together)
    time.sleep(GONE_S)
    place.proxy.recover()
    place.wait(tasks)


def _twice(place: Place, chance: random.Random) -> None:
    tasks = place.send(ONCE, 2 * place.together, SLEEP_MS // 4)
    for task in tasks:
        place.post(ONCE.task_name, task)
        place.post(ONCE.task_name, task, countdown=GONE_S)
    place.collect(tasks, over=lambda: all(len(task.final) > 2 for task in tasks), patience_s=PATIENCE_S)


def _limits(place: Place, chance: random.Random) -> None:
    limits = [chance.uniform(0.002, 0.05) for _ in range(LIMITED)]
    place.run_all(MANY, LIMITED, expected=False, limits=limits)


def _killed(place: Place, chance: random.Random) -> None:
    by_limit: dict[str, Any] = {} if place.pool == "prefork" else {"time_limit": 0.7}
    struck = place.send(WRITE, place.together, LONGEST_MS, expected=False, **by_limit)
    if not by_limit:
        place.until_asleep(place.together)
        place.kill_pool_processes()
    place.wait(struck)


FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("nothing", "Nothing goes wrong; several tasks run at one time.", _nothing),
        Fault("forked", "The main process has used the database before it forked.", _nothing, ("prefork",), True),
        Fault("twice", "Each message comes three times, two of them at the same moment.", _twice),
        Fault("retries", "Each task retries twice after it has written.", lambda place, _: place.run_all(RETRY, 24)),
        Fault("ignored", "Tasks raise Ignore after they have written; others follow.", _ignored),
        Fault("limits", f"Soft time limits strike {LIMITED} tasks at random moments.", _limits, ("prefork", ASYNCIO)),
        Fault(
            "killed",
            "Tasks are killed in the middle of a query: SIGKILL of the pool process, or a hard time limit.",
            _killed,
            ("prefork", "gevent", ASYNCIO),
        ),
        Fault("idle", "The server ends all idle connections.", _idle),
        Fault("busy", "The server ends all connections while tasks are in a statement.", _while_busy(Place.terminate)),
        Fault(
            "cut",
            "The network resets all connections while tasks are in a statement.",
            _while_busy(lambda place: place.proxy.cut()),
        ),
        Fault("gone", f"The server is gone for {GONE_S} s; tasks are retried on OperationalError.", _gone),
    )
}
