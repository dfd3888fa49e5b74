"""One Locust run: the hubs of this process, what came back, and the end of it."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import gevent
from locust import events
from locust.runners import MasterRunner, WorkerRunner

from ..percentiles import Percentiles
from ..rows import RowWriter, TaskRow
from ..workloads import Workload
from .buckets import install_buckets
from .hub import Pending, ReplyHub
from .outcomes import failure_of, row_of
from .records import LATENCY, PHASES, Records, phases_of
from .thresholds import EXIT_BREACH, Thresholds

REQUEST_TYPE = "celery"
DRAIN_S = 10.0
ROWS_EVERY = 200
FINISH, FINISHED, RECORDS = "celery_alchemy_finish", "celery_alchemy_finished", "celery_alchemy_records"

console = logging.getLogger("locust.stats_logger")
logger = logging.getLogger(__name__)


class Run:
    """What belongs to one Locust environment in one process."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.records = Records()
        self.hubs: dict[Any, ReplyHub] = {}
        self.rows_directory: Path | None = None
        """Where to write a row for each task; None: nowhere."""
        self.conclusions: list[str] = []
        """What to print at the end."""
        self.drain_s = DRAIN_S
        self._earlier = 0
        self._rows: list[TaskRow] = []
        self._writer: RowWriter | None = None
        self._finished: set[str] = set()

    def hub(self, key: Any, make: Callable[[], ReplyHub]) -> ReplyHub:
        """Return the hub of this key, which all its users share."""
        if key not in self.hubs:
            self.hubs[key] = make()
        return self.hubs[key]

    @property
    def in_flight(self) -> int:
        """Tasks without an answer yet, of this process."""
        return sum(hub.in_flight for hub in self.hubs.values())

    @property
    def tasks(self) -> int:
        """Tasks that have ended since the process began, of all its load generators."""
        return self._earlier + self.records.counts["ended"]

    def ended(
        self, pending: Pending, name: str, *, number: int, workload: Workload | None, context: dict[str, Any]
    ) -> None:
        """Tell Locust of a task that has ended: one `request` event, whose row alone counts in the aggregate."""
        row = row_of(pending, workload=name, number=number)
        failure = failure_of(row, workload)
        self.records.add(name, row, failure)
        if self.rows_directory:
            self._rows.append(row)
            if len(self._rows) >= ROWS_EVERY:
                self.write_rows()
        phases = phases_of(row) if row.finals else {}
        self.environment.events.request.fire(
            request_type=REQUEST_TYPE,
            name=name,
            response_time=row.latency_ms if row.finals else (time.monotonic() - row.intended) * 1000,
            response_length=0,
            exception=failure,
            context={**context, "task_id": row.task_id, "attempts": row.attempts, **phases},
        )
        for phase, milliseconds in phases.items():
            # Not an event: that would count the task again in the aggregate.
            self.environment.stats.get(name, phase).log(milliseconds, 0)

    def write_rows_to(self, directory: str) -> None:
        """Write a row for each task into a file in this directory; if it is another machine's, do not."""
        if self.rows_directory is None and Path(directory).is_dir():
            self.rows_directory = Path(directory)
            path = self.rows_directory / f"rows-{self.environment.runner.client_id}.csv"
            self._writer = RowWriter(path.open("a", newline=""))

    def write_rows(self) -> None:
        """Write the rows that are not yet written."""
        if self._writer and self._rows:
            self._writer.write(self._rows)
        self._rows.clear()

    def started(self) -> None:
        """Begin anew."""
        self._earlier += self.records.counts["ended"]
        self.records = Records()
        self._finished.clear()

    def stopped(self) -> None:
        """Wait for the answers to what is in flight; what is then unanswered counts as failed."""
        for hub in self.hubs.values():
            hub.drain(self.drain_s)
            hub.give_up(hub.unanswered())
        self.write_rows()

    def finish(self, **_: Any) -> None:
        """On a Locust worker: stop sending, wait for answers, say so."""
        runner = self.environment.runner
        runner.stop()
        # Before the message, on the same connection: the master has everything when it hears that this one is done.
        runner._send_stats()
        runner.send_message(FINISHED)

    def await_workers(self) -> None:
        """On the master: let the workers finish while it can still hear them; it leaves them half a second itself."""
        runner = self.environment.runner
        if not isinstance(runner, MasterRunner):
            return
        wanted = {client.id for client in runner.clients.all}
        runner.send_message(FINISH)
        deadline = time.monotonic() + self.drain_s + 5
        while not wanted & {client.id for client in runner.clients.all} <= self._finished:
            if time.monotonic() > deadline:
                logger.warning("Not every Locust worker has finished in time.")
                return
            gevent.sleep(0.02)

    def heard_finished(self, msg: Any, **_: Any) -> None:
        """On the master: a Locust worker has finished."""
        self._finished.add(msg.node_id)

    def close(self) -> None:
        """Disconnect."""
        for hub in self.hubs.values():
            hub.close()
        self.hubs.clear()


_RUNS: WeakKeyDictionary[Any, Run] = WeakKeyDictionary()


def run_of(environment: Any) -> Run:
    """Return the run of a Locust environment."""
    if environment not in _RUNS:
        run = _RUNS[environment] = Run(environment)
        _listen(run)
    return _RUNS[environment]


def _listen(run: Run) -> None:
    hooks, runner = run.environment.events, run.environment.runner
    hooks.test_start.add_listener(lambda **_: run.started())
    hooks.test_stopping.add_listener(lambda **_: run.await_workers())
    hooks.test_stop.add_listener(lambda **_: run.stopped())
    hooks.quitting.add_listener(lambda **_: _judge(run))
    hooks.quit.add_listener(lambda **_: _conclude(run))
    if isinstance(runner, WorkerRunner):
        hooks.report_to_master.add_listener(lambda data, **_: data.update({RECORDS: run.records.take_new()}))
        runner.register_message(FINISH, run.finish, concurrent=True)
    if isinstance(runner, MasterRunner):
        hooks.worker_report.add_listener(
            lambda data, **_: run.records.merge(data[RECORDS]) if RECORDS in data else None
        )
        runner.register_message(FINISHED, run.heard_finished)


def _judge(run: Run) -> None:
    """Set the exit code, once nothing is in flight."""
    environment = run.environment
    environment.runner.stop()
    if isinstance(environment.runner, WorkerRunner):
        environment.runner._send_stats()
        environment.process_exit_code = 0
        return
    thresholds = Thresholds.of(environment.parsed_options)
    if not thresholds.given:
        return
    breaches = thresholds.breaches(run.records)
    for breach in breaches:
        logger.error(breach)
    if environment.process_exit_code is None:
        environment.process_exit_code = EXIT_BREACH if breaches else 0


def _conclude(run: Run) -> None:
    run.close()
    if not isinstance(run.environment.runner, WorkerRunner):
        for line in [*report(run.records), "", *run.conclusions]:
            console.info(line)


def report(records: Records) -> list[str]:
    """Return a table of exact percentiles, of the tasks that succeeded."""
    lines = [
        f"{records.counts['succeeded']} of {records.counts['ended']} tasks succeeded in {records.seconds:.1f} s, "
        f"{records.goodput_per_s:.1f} per second; {records.counts['unanswered']} unanswered."
    ]
    if (lag := records.generator_lag_ms) is not None:
        lines.append(
            f"The load generator was late itself: it sent tasks up to {lag:.2f} ms (p99) after their time. "
            "Use --processes, or another machine."
        )
    names = records.names()
    if not names:
        return lines
    width = max(len(name) for name in names) + 1
    lines += ["", f"{'Exact, in ms':{width}}{'':9} {'n':>8} {'p50':>10} {'p95':>10} {'p99':>10} {'max':>10}"]
    for name in names:
        for phase in (LATENCY, *PHASES):
            if found := Percentiles.of(records.values(phase, name)):
                cells = " ".join(f"{value:10.2f}" for value in (found.p50, found.p95, found.p99, found.max))
                lines.append(f"{name:{width}}{phase:9} {found.n:8} {cells}")
    return lines


def _interrupt() -> None:
    """Let Ctrl-C reach Locust's main greenlet.

    Python raises KeyboardInterrupt in whichever greenlet runs: mostly in one that reads replies, which would end it
    while tasks are still in flight.
    """
    gevent.get_hub().handle_system_error(KeyboardInterrupt, KeyboardInterrupt())


def register() -> None:
    """Have every Locust process that imports this package compute in finer buckets, and keep a run."""

    def begin(environment: Any, **_: Any) -> None:
        run_of(environment)
        gevent.signal_handler(signal.SIGINT, _interrupt)

    install_buckets()
    hooks: Any = events
    hooks.init.add_listener(begin)
