"""One Locust run: the hubs of this process, Locust's statistics of what came back, and the end of it."""

from __future__ import annotations

import itertools
import logging
import math
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from weakref import WeakKeyDictionary

import gevent
from locust import events, stats
from locust.runners import MasterRunner, WorkerRunner

from ..bench.checks import failure
from ..bench.rows import UNANSWERED, TaskRow, write_rows
from ..tasks.workloads import Workload
from .hub import ReplyHub

REQUEST_TYPE, LAG = "celery", "lag"
"""What Locust's tables call the latency of tasks, and how late arrivals were sent."""
PHASES = {REQUEST_TYPE: "latency", **{phase: phase for phase in ("queue", "checkout", "database", "run")}}
DRAIN_S = 10.0
LATE = 0.1  # Share of the median latency from which on the load generator measures itself
FINISH, FINISHED, TASKS = "celery_alchemy_finish", "celery_alchemy_finished", "celery_alchemy_tasks"
EXIT_BREACH, ERROR_LENGTH = 3, 120

console: logging.Logger = logging.getLogger("locust.stats_logger")
logger: logging.Logger = logging.getLogger(__name__)


class TaskFailed(Exception):
    """The worker says that the task failed, or it ended otherwise than it was meant to."""


class TaskUnanswered(Exception):
    """No final reply came in time."""


def failure_of(row: TaskRow, workload: Workload | None) -> Exception | None:
    """Return what to count a task as failed for; None if it ended as it was meant to.

    Args:
        workload: None for a task of somebody else's, which is meant to succeed.
    """

    def alike(message: str) -> str:
        # Without what differs from task to task: Locust keeps every different one.
        return re.sub(r"[0-9a-f]{8,}|\d+", "N", message)[:ERROR_LENGTH]

    if row.outcome == UNANSWERED:
        return TaskUnanswered(row.error_type and f"not sent: {row.error_type}: {alike(row.error)}")
    wrong = failure(row, workload)
    return TaskFailed(alike(wrong)) if wrong else None


def bucket(response_time: float) -> float:
    """Return the milliseconds to 3 significant digits, but not finer than 0.01 ms.

    Locust's own buckets are 1 ms wide below 100 ms: 2.4 and 2.5 ms, 5 % apart, would be shown as 2 and 3.
    """
    return round(response_time, 2 if response_time < 1 else 2 - math.floor(math.log10(response_time)))


class Run:
    """What belongs to one Locust environment in one process."""

    def __init__(self, environment: Any) -> None:
        self.environment: Any = environment
        self.hubs: dict[Any, ReplyHub] = {}
        self.tasks: int = 0  # Tasks that have ended since the process began; on the master of all its load generators
        self.conclusions: list[str] = []  # What to print at the end
        self._report: list[str] = []
        self._rows: IO[str] | None = None
        self._finished: set[str] = set()
        runner, hooks = environment.runner, environment.events
        hooks.test_start.add_listener(lambda **_: self._finished.clear())
        hooks.test_stop.add_listener(lambda **_: self.drain())
        hooks.quitting.add_listener(lambda **_: self.judge())
        hooks.quit.add_listener(lambda **_: self.conclude())
        if isinstance(runner, WorkerRunner):
            hooks.report_to_master.add_listener(self._tell)
            runner.register_message(FINISH, lambda **_: self.finish(), concurrent=True)
        if isinstance(runner, MasterRunner):
            hooks.test_stopping.add_listener(lambda **_: self.await_workers())
            hooks.worker_report.add_listener(self._hear)
            runner.register_message(FINISHED, lambda msg, **_: self._finished.add(msg.node_id))

    def _tell(self, data: dict[str, Any], **_: Any) -> None:
        data[TASKS], self.tasks = self.tasks, 0

    def _hear(self, data: dict[str, Any], **_: Any) -> None:
        self.tasks += data.get(TASKS, 0)

    def write_rows_to(self, directory: str) -> None:
        """Write a row for each task into a file in this directory; if it is another machine's, do not."""
        if self._rows is None and Path(directory).is_dir():
            path = Path(directory) / f"rows-{self.environment.runner.client_id}.csv"
            self._rows = path.open("a", newline="")

    def ended(self, row: TaskRow, workload: Workload | None, *, arrival: bool, context: dict[str, Any]) -> None:
        """Tell Locust of a task that has ended: one `request` event, whose row alone counts in the aggregate.

        A task that failed has no response time: to fail fast is no way to keep a percentile.
        """
        failure = failure_of(row, workload)
        self.tasks += 1
        if self._rows:
            write_rows(self._rows, [row])
        phases = {"queue": row.queue_ms, "run": row.run_ms} if row.finals else {}
        if row.checkout_ms or row.database_ms:  # Events do not tell of the database
            phases |= {"checkout": row.checkout_ms, "database": row.database_ms}
        self.environment.events.request.fire(
            request_type=REQUEST_TYPE, name=row.workload, response_time=None if failure else row.latency_ms,
            response_length=0, exception=failure,
            context={**context, "task_id": row.task_id, "attempts": row.attempts, **phases},
        )  # fmt: skip
        for phase, milliseconds in {**phases, **({LAG: row.send_lag_ms} if arrival else {})}.items():
            # Not an event: that would count the task again in the aggregate.
            self.environment.stats.get(row.workload, phase).log(milliseconds, 0)

    def drain(self) -> None:
        """Wait for the answers to what is in flight; what is then unanswered counts as failed."""
        for hub in self.hubs.values():
            hub.drain(DRAIN_S)
            hub.give_up()

    def finish(self) -> None:
        """On a Locust worker: stop sending, wait for answers, say so."""
        runner = self.environment.runner
        runner.stop()
        # Before the message, on the same connection: the master has everything when it hears that this one is done.
        runner._send_stats()
        runner.send_message(FINISHED)

    def await_workers(self) -> None:
        """On the master: let the workers finish while it can still hear them; it leaves them half a second itself."""
        runner = self.environment.runner
        wanted = {client.id for client in runner.clients.all}
        runner.send_message(FINISH)
        deadline = time.monotonic() + DRAIN_S + 5
        while not wanted & {client.id for client in runner.clients.all} <= self._finished:
            if time.monotonic() > deadline:
                logger.warning("Not every Locust worker has finished in time.")
                return
            gevent.sleep(0.02)

    def judge(self) -> None:
        """Set the exit code, once nothing is in flight: 3 if a threshold is not kept.

        Otherwise Locust decides: 1 if a task failed, unless --fail-ratio says how many may.
        """
        environment = self.environment
        environment.runner.stop()
        if isinstance(environment.runner, WorkerRunner):
            environment.runner._send_stats()
            environment.process_exit_code = 0
            return
        # Now: writing them as JSON is how Locust begins its statistics anew.
        self._report = report(environment.stats)
        breaches = list(breaches_of(environment.stats, environment.parsed_options))
        for breach in breaches:
            logger.error(breach)
        if environment.process_exit_code is None:
            allowed = getattr(environment.parsed_options, "fail_ratio", None) is not None
            environment.process_exit_code = EXIT_BREACH if breaches else 0 if allowed else None

    def conclude(self) -> None:
        """Disconnect, and print the percentiles."""
        self.close()
        if not isinstance(self.environment.runner, WorkerRunner):
            for line in [*self._report, "", *self.conclusions]:
                console.info(line)

    def close(self) -> None:
        """Disconnect."""
        for hub in self.hubs.values():
            hub.close()
        self.hubs.clear()


def merged(statistics: Any, method: str = REQUEST_TYPE) -> Any:
    """Return Locust's statistics of a phase, or of the latency, of all tasks together."""
    found = stats.StatsEntry(statistics, "all", method)
    found.start_time = statistics.total.start_time
    for (_, of), entry in statistics.entries.items():
        if of == method:
            found.extend(entry)
    return found


def goodput_per_s(tasks: Any) -> float:
    """Return the successful tasks per second, from the start of the test to the last one's end."""
    seconds = (tasks.last_request_timestamp or 0.0) - tasks.start_time
    return float((tasks.num_requests - tasks.num_failures) / seconds) if seconds > 0 else 0.0


def breaches_of(statistics: Any, options: Any) -> Iterator[str]:
    """Yield a sentence for each threshold that was not kept. Without a single successful task no latency is kept."""
    tasks = merged(statistics)
    p95, p99 = (tasks.get_response_time_percentile(share) or math.inf for share in (0.95, 0.99))
    ratio, goodput = tasks.fail_ratio if tasks.num_requests else math.inf, goodput_per_s(tasks)
    # What was found, with the sign that makes less of it better.
    for name, sign, value, found in (
        ("fail_p95", 1, p95, f"the p95 latency is {p95:.2f} ms; the limit is {{:g}} ms."),
        ("fail_p99", 1, p99, f"the p99 latency is {p99:.2f} ms; the limit is {{:g}} ms."),
        ("fail_ratio", 1, ratio, f"{tasks.num_failures} of {tasks.num_requests} tasks failed; the limit is {{:g}}."),
        ("fail_goodput", -1, goodput, f"{goodput:.1f} successful tasks per second; the limit is {{:g}}."),
    ):
        limit = getattr(options, name, None)
        if limit is not None and sign * value > sign * limit:
            yield f"--{name.replace('_', '-')}: {found.format(limit)}"


def report(statistics: Any) -> list[str]:
    """Return a table of percentiles to 3 significant digits: Locust's own shows whole milliseconds."""
    tasks, lag = merged(statistics), merged(statistics, LAG).get_response_time_percentile(0.99)
    errors = [(stats.StatsError.parse_error(one.error), one.occurrences) for one in statistics.errors.values()]
    unanswered = sum(occurrences for text, occurrences in errors if text.startswith(TaskUnanswered.__name__))
    lines = [
        f"{tasks.num_requests - tasks.num_failures} of {tasks.num_requests} tasks succeeded, "
        f"{goodput_per_s(tasks):.1f} per second; {unanswered} unanswered."
    ]
    if lag > LATE * tasks.get_response_time_percentile(0.5) > 0:
        lines.append(
            f"The load generator was late itself: it sent tasks up to {lag:.2f} ms (p99) after their time. "
            "Use --processes, or another machine."
        )
    names = sorted({name for name, method in statistics.entries if method == REQUEST_TYPE})
    width = max(map(len, names), default=0) + len(" database")
    lines += ["", f"{'In ms':{width}} {'n':>8} {'p50':>10} {'p95':>10} {'p99':>10} {'max':>10}"]
    for name, (method, phase) in itertools.product(names, PHASES.items()):
        entry = statistics.entries.get((name, method))
        if entry and (n := entry.num_requests - entry.num_none_requests):
            found = [*map(entry.get_response_time_percentile, (0.5, 0.95, 0.99)), entry.max_response_time]
            lines.append(f"{f'{name} {phase}':{width}} {n:8} {' '.join(f'{value:10.2f}' for value in found)}")
    return lines


_RUNS: WeakKeyDictionary[Any, Run] = WeakKeyDictionary()


def run_of(environment: Any) -> Run:
    """Return the run of a Locust environment."""
    return _RUNS.get(environment) or _RUNS.setdefault(environment, Run(environment))


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

    replaced: Any = stats
    replaced.bucket_response_time = bucket
    hooks: Any = events
    hooks.init.add_listener(begin)
