"""One cell: a worker on a database, a queue and a reply list of its own, and what is wrong with what it did."""

from __future__ import annotations

import itertools
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL

from ..brokers import Broker, queue_of
from ..databases import DatabaseServer, create_tables
from ..environment import WorkerEnvironment
from ..errors import WorkerError
from ..patterns import OURS
from ..percentiles import Percentiles
from ..processes import StopStep
from ..rows import TaskRow
from ..rundir import RunDirectory
from ..sampler import Connections, Observer
from ..worker import OWN_APP, Worker, running_worker
from ..workloads import ACCOUNTS, PREFLIGHT, WORKLOADS
from . import checks
from .generator import Generator
from .measure import memory_bytes
from .results import Arm, Cell, Verdict
from .user_task import UserTask

START_S = 90.0
SETTLE_S = 1.0
# A worker whose sessions are broken can ignore both; each batch waits for its slowest.
STOP_STEPS = (StopStep(signal.SIGTERM, 8.0), StopStep(signal.SIGQUIT, 2.0))
DRAIN_S = 5.0
"""How long to wait for the next reply. A task of ours takes well under a second; one that takes longer hangs."""
USER_DRAIN_S = 60.0
"""The same for a task of the user's, which may take long."""
BACKLOG_S = 120.0
"""The longest a backlog can take after a load, however steadily it is worked off."""
LOG_LINES = 40
GREEN = ("gevent", "eventlet")
STARTED = "the worker started"

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cells of a run share."""

    run: RunDirectory
    server: DatabaseServer | None
    """None if the task is somebody else's and its database is not known."""
    broker: Broker
    generator: Generator
    user_task: UserTask | None = None


class RunningCell:
    """A cell whose worker is up, or was meant to be."""

    def __init__(self, bench: Bench, arm: Arm, workload: str) -> None:
        self.arm = arm
        self.rows: list[TaskRow] = []
        self.out = False
        """Broken, or hanging: it gets no more load."""
        self._bench = bench
        self._workload = workload
        self._number = next(_numbers)
        self._stack = ExitStack()
        self._worker: Worker | None = None
        self._environment: WorkerEnvironment | None = None
        self._failed_start = ""
        self._preflight: list[Verdict] = []
        self._memory = 0
        self._abandoned: list[Verdict] = []
        self.database: URL | None = None

    @property
    def worker_pid(self) -> int:
        """The worker's main process; 0 if it did not start."""
        return self._worker.process.pid if self._worker else 0

    def start(self) -> None:
        """Create the database and the queue, start the worker and wait until it is ready; remember if that fails."""
        bench = self._bench
        try:
            if bench.user_task:
                self.database = bench.user_task.database_url
            else:
                assert bench.server is not None
                self.database = self._stack.enter_context(bench.server.fresh_database(bench.run, f"c{self._number}"))
                create_tables(self.database, ACCOUNTS)
            self._environment = WorkerEnvironment(
                database_url=self.database.render_as_string(hide_password=False) if self.database else "",
                broker_url=bench.broker.url,
                reply_url=bench.broker.reply_url,
                queue=f"celery-alchemy-{bench.run.id}-{self._number}",
                pattern=self.arm.pattern,
            )
            self._stack.enter_context(queue_of(bench.run, self._environment))
            self._worker = self._stack.enter_context(
                running_worker(
                    bench.run,
                    self._environment,
                    pool=self.arm.pool,
                    concurrency=self.arm.concurrency,
                    strategy=self.arm.strategy or None,
                    name=f"{self._number}-{self.arm.name}",
                    app=bench.user_task.app if bench.user_task else OWN_APP,
                    app_environ=bench.user_task.environ if bench.user_task else None,
                    # All the workers of a contest start at once.
                    start_timeout_s=START_S,
                    stop_steps=STOP_STEPS,
                )
            )
        except WorkerError as error:
            self._failed_start, self.out = str(error), True

    def connect(self) -> None:
        """Let the load generator know this arm, and see to it that its driver does not block the green hub."""
        if self._environment is None or self.out:
            return
        self._bench.generator.open(self.arm.name, self._environment)
        if self.arm.pool in GREEN and self._bench.user_task is None:
            command = {"number": 0, "arm": self.arm.name, "task": PREFLIGHT.task_name, "args": [1], "kwargs": {}}
            _, rows = self._bench.generator.slice(within_s=DRAIN_S, tasks=1, users=1, drain_s=DRAIN_S, **command)
            answered = rows[0] if rows else None
            passed = answered is not None and answered.succeeded
            wrong = "no answer" if answered is None else f"{answered.error_type or answered.outcome}: {answered.error}"
            self._preflight = [Verdict("the driver does not block the green hub", passed, "" if passed else wrong)]
            self.out = not passed

    def load(self, *, number: int, within_s: float, **command: Any) -> dict[str, Any]:
        """Put the worker under load; keep the rows, and return the load generator's summary."""
        task = self._bench.user_task
        subject: dict[str, Any] = (
            {"task": task.task, "args": task.args, "kwargs": task.kwargs} if task else {"workload": self._workload}
        )
        answer, rows = self._bench.generator.slice(
            within_s=within_s + BACKLOG_S,
            number=number,
            arm=self.arm.name,
            first_number=len(self.rows),
            drain_s=USER_DRAIN_S if task else DRAIN_S,
            **subject,
            **command,
        )
        self.rows += rows
        if answer["unanswered"]:
            self.out = True
        return answer

    def check(self, peak: Connections | None, sampling_error: str | None) -> list[Verdict]:
        """Return what holds and what does not, now that nothing runs."""
        if self._failed_start:
            return [Verdict(STARTED, False, self._failed_start)]
        workload = None if self._bench.user_task else WORKLOADS[self._workload]
        verdicts = [
            *self._preflight,
            *checks.check_answers(self.rows, workload),
            *checks.check_sessions(self.rows),
        ]
        # In a user's own database there are others, whose rows and connections say nothing of this worker.
        if workload is not None:
            assert self.database is not None
            verdicts += checks.check_ledger(self.database, self.rows, workload)
            with self._observing() as (observer, name):
                left = observer.settle(name, idle_in_transaction=0, within_s=SETTLE_S)
            facts = checks.ConnectionFacts(
                peak=peak.total if peak else 0,
                promised=self._worker.ready.max_connections if self._worker else None,
                idle_in_transaction=left.idle_in_transaction,
                sampling_error=sampling_error,
            )
            verdicts += checks.check_connections(facts)
        self.out = self.out or not all(verdict.passed for verdict in verdicts)
        return verdicts

    def abandon(self) -> None:
        """Kill the worker of a broken cell, so that it takes nothing from the others: a hanging one may be busy."""
        if self._worker is not None:
            self._abandoned = self.check(None, None)
            self._worker.process.stop(at_once=True)

    def measure_memory(self) -> None:
        """Note the worker's memory now."""
        if self._worker is not None and not self._abandoned:
            self._memory = memory_bytes(self._worker.process.pid)

    def finish(self, peak: Connections | None, sampling_error: str | None, *, at_once: bool = False) -> Cell:
        """Check everything, stop the worker, and return what there is to keep.

        Args:
            at_once: Kill the worker, without seeing how it stops.
        """
        verdicts = self._abandoned or self.check(peak, sampling_error)
        worker = self._worker
        if worker is None:
            return Cell(self.arm, verdicts)
        if at_once:
            worker.process.stop(at_once=True)
        elif not self._abandoned:
            verdicts += self._stop(worker)
        broken = not all(verdict.passed for verdict in verdicts)
        return Cell(
            self.arm,
            verdicts,
            strategy=worker.ready.strategy if self.arm.pattern == OURS else "",
            reason=worker.ready.reason if self.arm.pattern == OURS else "",
            start_s=round(worker.start_s, 2),
            promised_connections=worker.ready.max_connections,
            peak_connections=peak.total if peak else 0,
            peak_idle_in_transaction=peak.idle_in_transaction if peak else 0,
            pss_bytes=self._memory,
            phases=phases([row for row in self.rows if row.slice] or self.rows),
            errors=self._errors(),
            tasks=len(self.rows),
            log=worker.process.log_tail(LOG_LINES) if broken else "",
        )

    def _stop(self, worker: Worker) -> list[Verdict]:
        verdicts = [checks.stop(worker)]
        if not self._bench.user_task:
            with self._observing() as (observer, name):
                verdicts.append(checks.check_end(observer, name))
        return verdicts

    def disconnect(self) -> None:
        """Let the load generator forget this arm."""
        if self._environment is not None and self._worker is not None:
            self._bench.generator.close(self.arm.name)

    def close(self) -> None:
        """Stop what still runs; drop the database and the queue."""
        self._stack.close()

    @contextmanager
    def _observing(self) -> Iterator[tuple[Observer, str]]:
        assert self._bench.server is not None
        assert self.database is not None
        name = str(self.database.database)
        observer = Observer(self._bench.server.url, name)
        try:
            yield observer, name
        finally:
            observer.close()

    def _errors(self) -> dict[str, int]:
        workload = None if self._bench.user_task else WORKLOADS[self._workload]
        wrong = (row for row in self.rows if checks.failure(row, workload))
        return dict(Counter(row.error_type or row.outcome for row in wrong))


def phases(rows: list[TaskRow]) -> dict[str, Percentiles]:
    """Return where the time of successful tasks went, in milliseconds."""
    done = [row for row in rows if row.succeeded]
    parts = {
        "queue": [row.queue_ms for row in done],
        "checkout": [row.checkout_ms for row in done],
        "database": [row.database_ms for row in done],
        "run": [row.run_ms for row in done],
        "latency": [row.latency_ms for row in done],
    }
    return {name: found for name, values in parts.items() if (found := Percentiles.of(values))}
