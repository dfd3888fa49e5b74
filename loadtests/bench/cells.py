"""One cell: a worker with a database, a queue and a reply list of its own, its load, and what is wrong with it."""

from __future__ import annotations

import itertools
import math
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import URL

from ..client.lines import LineProcess
from ..errors import WorkerError
from ..services.harness import LoadWorker, Services, Worker, load_worker
from ..services.processes import StopStep, deferred_signals
from ..services.rundir import RunDirectory
from ..services.sampler import Connections, CpuClock, Sampler, Spent, memory_bytes, spent
from ..tasks.patterns import AWAITED, OURS
from ..tasks.workloads import PREFLIGHT, WORKLOADS, Workload
from . import checks
from .arguments import GREEN
from .contests import UserTask
from .results import Arm, Cell, Counted, Verdict
from .rows import UNANSWERED, Percentiles, TaskRow

START_S = 90.0
SETTLE_S, END_S = 1.0, 3.0
"""How long tasks may take to give their connections back, and a server to notice that a client is gone."""
# A worker whose sessions are broken can ignore both; each batch waits for its slowest.
STOP_STEPS = (StopStep(signal.SIGTERM, 8.0), StopStep(signal.SIGQUIT, 2.0))
DRAIN_S, USER_DRAIN_S = 5.0, 60.0
"""How long to wait for the next reply of a task of ours, which takes well under a second, and of the user's."""
LOG_LINES = 40
STARTED, PREFLIGHT_HELD = "the worker started", "the driver does not block the green hub"

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Bench(Services):
    """What all cells of a run share."""

    generator: Generator | None = None  # None where the load comes from elsewhere
    user_task: UserTask | None = None


class RunningCell:
    """A cell whose worker is up, or was meant to be."""

    def __init__(self, bench: Bench, arm: Arm, workload: str) -> None:
        self.bench: Bench = bench
        self.arm: Arm = arm
        self.workload: Workload | None = WORKLOADS.get(workload)
        self.rows: list[TaskRow] = []
        self.out: bool = False  # Broken, or hanging: it gets no more load
        self.failed_start: str = ""
        self.connections_name: str = ""  # What the server knows its connections by; empty if it does not
        self.counted: list[Spent] = []  # What each load of a demo has cost
        self.sampler: Sampler | None = None  # Counts its connections all the time; None if nobody does
        self.place: LoadWorker | None = None  # None until its worker is ready
        self._subject: dict[str, Any] = {"workload": workload}
        self._number = next(_numbers)
        self._stack = ExitStack()
        self._preflight: list[Verdict] = []
        self._memory = 0
        self._abandoned: list[Verdict] = []

    @property
    def worker(self) -> Worker | None:
        """Its worker; None if it did not start."""
        return self.place.worker if self.place else None

    @property
    def worker_pid(self) -> int:
        """The worker's main process; 0 if it did not start."""
        return self.worker.process.pid if self.worker else 0

    @property
    def hangs(self) -> bool:
        """Whether it has left a task unanswered: it would not stop when it is told to, either."""
        return any(not row.finals for row in self.rows)

    @property
    def target(self) -> dict[str, str]:
        """Where a load generator sends its tasks, and reads how they ended."""
        assert self.place is not None
        return {name: getattr(self.place.environment, name) for name in ("broker_url", "reply_url", "queue")}

    def start(self) -> None:
        """Create the database and the queue, start the worker and wait until it is ready; remember if that fails."""
        bench, task = self.bench, self.bench.user_task
        name, theirs = f"celery-alchemy-{bench.run.id}-{self._number}", dict[str, Any]()
        if task:
            theirs = {"app": task.app, "theirs": task.database_url, "app_environ": {**task.environ, "PGAPPNAME": name}}
            self._subject = {"task": task.task, "args": task.args, "kwargs": task.kwargs}
        try:
            # All the workers of a contest start at once.
            worker = load_worker(
                bench, kind=LoadWorker, pool=self.arm.pool, concurrency=self.arm.concurrency, pattern=self.arm.pattern,
                strategy=self.arm.strategy or None, name=f"c{self._number}", queue=name, start_timeout_s=START_S,
                stop_steps=STOP_STEPS, **theirs,
            )  # fmt: skip
            self.place = self._stack.enter_context(worker)
        except WorkerError as error:
            self.failed_start, self.out = str(error), True
            return
        database: URL | None = self.place.database
        if database is not None and (not task or database.get_backend_name() == "postgresql"):
            self.connections_name = name if task else str(database.database)

    def connect(self) -> None:
        """Let the load generator know this arm, and see to it that its driver does not block the green hub."""
        generator = self.bench.generator
        if generator is None or self.out:
            return
        generator.ask(ANSWER_S, open={"arm": self.arm.name, **self.target})
        if self.arm.pool in GREEN and self.bench.user_task is None:
            asked = {"number": 0, "arm": self.arm.name, "task": PREFLIGHT.task_name, "args": [1], "tasks": 1}
            _, (row,) = generator.slice(within_s=DRAIN_S, drain_s=DRAIN_S, **asked)
            wrong = "" if row.succeeded else f"{row.error_type or row.outcome}: {row.error}"
            self._preflight, self.out = [Verdict(PREFLIGHT_HELD, not wrong, wrong)], bool(wrong)

    def measure(self, *, number: int, within_s: float, **command: Any) -> tuple[dict[str, Any], dict[str, Any], Spent]:
        """Put the worker under load, and keep the rows.

        Returns:
            The load generator's summary, what of it every kind of measurement keeps, and the cost.
        """
        generator, server = self.bench.generator, self.bench.server
        assert generator is not None
        drain_s = USER_DRAIN_S if self.bench.user_task else DRAIN_S
        asked = {"drain_s": drain_s, "first_number": len(self.rows), **self._subject, **command}
        begin = CpuClock.read()
        answer, rows = generator.slice(within_s=within_s, number=number, arm=self.arm.name, **asked)
        cost = spent(begin, self.worker_pid, server.pid if server else None)
        self.rows += rows
        self.out = self.out or bool(answer["unanswered"])
        low, high = answer["window"]
        kept = {name: answer[name] for name in ("failed", "unanswered", "send_lag_p99_ms")}
        kept |= {"seconds": round(high - low, 6), "foreign_cpus": round(cost.foreign_cpus, 3)}
        kept["latency"] = Percentiles(**answer["latency_ms"]) if answer["latency_ms"] else None
        return answer, kept, cost

    @property
    def peak(self) -> Connections:
        """The most connections that were seen."""
        return self.sampler.peaks[self.connections_name] if self.sampler and self.connections_name else Connections()

    def check(self) -> list[Verdict]:
        """Return what holds and what does not, now that nothing runs."""
        if self.failed_start:
            return [Verdict(STARTED, False, self.failed_start)]
        # First: reading the ledger is a connection more.
        idle, _ = self.left(idle_in_transaction=0)
        unseen = self.sampler.error if self.sampler else "nobody looked all the time"
        if self.bench.user_task and not self.peak.total:
            unseen = f"no connection of the application name {self.connections_name!r} was seen on a PostgreSQL"
        promised = self.worker.max_connections if self.worker else None
        connections = checks.check_connections(self.peak.total, promised, idle, unseen)
        # In a user's own database there are others, whose rows say nothing of this worker.
        found = checks.check_tasks(
            self.rows, self.workload, self.place.database if self.workload and self.place else None
        )
        verdicts = [*self._preflight, *found.verdicts, *connections]
        self.out = self.out or not all(verdict.passed for verdict in verdicts)
        return verdicts

    def left(self, *, total: float = math.inf, idle_in_transaction: float = math.inf) -> tuple[int, int]:
        """Wait for connections to be given back or closed; return those idle in transaction, and all that are left."""
        if not self.connections_name or self.sampler is None:
            return 0, 0
        limits = {"total": total, "idle_in_transaction": idle_in_transaction}
        within_s = END_S if total < math.inf else SETTLE_S
        seen = self.sampler.settle(self.connections_name, **limits, within_s=within_s)
        return seen.idle_in_transaction, seen.total

    def abandon(self) -> None:
        """Kill the worker if it is broken, so that it takes nothing from the others: a hanging one may be busy."""
        if self.out and self.worker is not None:
            self._abandoned = self.check()
            self.worker.process.stop(at_once=True)

    def measure_memory(self) -> None:
        """Note the worker's memory now."""
        if self.worker is not None and not self._abandoned and not self.counted:
            self._memory = memory_bytes(self.worker.process.pid)

    def finish(self, *, at_once: bool = False) -> Cell:
        """Check everything, stop the worker, and return what there is to keep.

        Args:
            at_once: Kill the worker, without seeing how it stops.
        """
        verdicts, worker = self._abandoned or self.check(), self.worker
        if worker is None:
            return Cell(self.arm, verdicts)
        counted = self._count() if self.counted else None
        if at_once or self.hangs:
            worker.process.stop(at_once=True)
        elif not self._abandoned:
            verdicts += self.stop()
        wrong = (row for row in self.rows if checks.failure(row, self.workload))
        ours = self.arm.pattern in {OURS, AWAITED}
        return Cell(
            self.arm, verdicts, strategy=worker.strategy if ours else "", reason=worker.reason if ours else "",
            start_s=round(worker.start_s, 2), promised_connections=worker.max_connections,
            peak_connections=self.peak.total, pss_bytes=self._memory, tasks=len(self.rows), counted=counted,
            phases=phases([row for row in self.rows if row.slice] or self.rows),
            errors=dict(Counter(row.error_type or row.outcome for row in wrong)),
            log=worker.process.log_tail(LOG_LINES) if not all(verdict.passed for verdict in verdicts) else "",
        )  # fmt: skip

    def stop(self) -> list[Verdict]:
        """Stop the worker, and see that none of its connections outlives it."""
        assert self.worker is not None
        return [checks.stop(self.worker), *([checks.outlived(self.left(total=0)[1])] if self.connections_name else [])]

    def _count(self) -> Counted:
        """Count the tasks of a demo one by one."""
        assert self.place is not None
        wrong = len(checks.check_tasks(self.rows, self.workload, self.place.database).wrong)
        unanswered = sum(row.outcome == UNANSWERED for row in self.rows)
        right, (idle, _) = len(self.rows) - wrong - unanswered, self.left(idle_in_transaction=0)
        seconds, cpu_s = (round(sum(getattr(one, what) for one in self.counted), 3) for what in ("wall_s", "worker_s"))
        return Counted(len(self.rows), right, wrong, unanswered, idle, seconds, cpu_s)

    def close(self) -> None:
        """Stop what still runs; drop the database and the queue."""
        self._stack.close()


def phases(rows: list[TaskRow]) -> dict[str, Percentiles]:
    """Return where the time of successful tasks went, in milliseconds."""
    done = [row for row in rows if row.succeeded]
    names = ("queue", "checkout", "database", "run", "latency")
    parts = {name: Percentiles.of(getattr(row, f"{name}_ms") for row in done) for name in names}
    return {name: found for name, found in parts.items() if found}


# gevent has to patch the standard library before this package, Celery and SQLAlchemy have imported it.
COMMAND = ("gevent.monkey", "--module", "celery_alchemy.loadtests.client.generator")
ANSWER_S = 180.0  # On top of what a load is meant to take: a backlog is worked off for up to two minutes
STOP_S = 10.0


class Generator(LineProcess):
    """One long-lived gevent process."""

    def __init__(self, run: RunDirectory) -> None:
        super().__init__("The load generator", "-m", *COMMAND, log=run.path / "generator.log")

    def slice(self, *, within_s: float, **command: Any) -> tuple[dict[str, Any], list[TaskRow]]:
        """Put an arm under load, and return the summary and a row for each task.

        Args:
            within_s: How long the load itself can take.
        """
        answer = self.ask(within_s + ANSWER_S, slice=command)
        return answer, [TaskRow(*row) for row in answer.pop("rows")]

    @classmethod
    @contextmanager
    def running(cls, run: RunDirectory) -> Iterator[Self]:
        """Start it, and end it when the block ends."""
        with deferred_signals():
            generator = cls(run)
            guarded = run.guard.watch_process(generator.pid)
        try:
            yield generator
        finally:
            generator.stop(STOP_S)
            run.guard.forget(guarded)
