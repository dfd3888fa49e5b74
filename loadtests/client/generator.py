"""The benchmark's load generator: one long-lived gevent process that takes its commands from stdin.

    python -m gevent.monkey --module celery_alchemy.loadtests.client.generator

    {"open": {"arm": ..., "broker_url": ..., "reply_url": ..., "queue": ...}}
    {"slice": {"number": 17, "arm": ..., "workload": "transfer", "users": 8, "seconds": 1.0, "ramp_s": 0.1}}
    {"slice": {..., "users": 8, "tasks": 300}}                                      exactly 300 tasks
    {"slice": {..., "rate_per_s": 50.0, "seconds": 4.0}}                          arrivals, whatever the worker does
    {"slice": {..., "rate_per_s": 50.0, "seconds": 4.0, "limit_ms": 50.0}}          skips those that are overdue, counts
    {"slice": {..., "task": "proj.tasks.x", "args": [1], "kwargs": {}}}             somebody else's task
    {"close": {"arm": ...}}

The answer to a slice has its `rows`: the values of a `TaskRow` for each task.
"""

from __future__ import annotations

import gc
import logging
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import gevent
from gevent.fileobject import FileObject

from ..bench.checks import failure
from ..bench.rows import COLUMNS, Percentiles, TaskRow, nearest_rank
from ..tasks.workloads import WORKLOADS, Workload
from .hub import Pending, ReplyHub
from .lines import answer_lines

DRAIN_S, DRAIN_STEP_S = 10.0, 0.1
BACKLOG_S = 120.0  # The longest wait for a backlog, however steadily it is worked off
UNBOUNDED_S = 1e9


@dataclass(eq=False)
class Load:
    """A slice that runs: what the command asks for, and what came of it."""

    hub: ReplyHub
    number: int
    arm: str
    workload: str | None = None
    task: str | None = None  # Somebody else's, in place of a workload
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    users: int = 1
    seconds: float | None = None
    tasks: int | None = None
    rate_per_s: float | None = None
    ramp_s: float = 0.0
    drain_s: float = DRAIN_S
    first_number: int = 0
    limit_ms: float = math.inf
    """Later answers count as late; arrivals overdue by more are skipped: like `pgbench --latency-limit`."""

    def __post_init__(self) -> None:
        if (self.tasks is None) == (self.seconds is None):
            raise ValueError("A slice needs either 'seconds' or 'tasks'.")
        if self.rate_per_s is not None and (self.seconds is None or self.rate_per_s <= 0):
            raise ValueError("'rate_per_s' must be positive, and needs 'seconds'.")
        self.work: Workload | None = None if self.task else WORKLOADS[str(self.workload)]
        self.rows: list[TaskRow] = []
        self.claimed: int = 0
        self.skipped: int = 0
        self.timed_out: bool = False
        self.error: Exception | None = None  # What went wrong in the load generator itself
        self.begun: float = time.monotonic()
        self.last_progress: float = self.begun
        self._latest = math.inf
        self.low: float = self.begun + self.ramp_s  # Begin of the window that is measured
        self.high: float = self.low + (UNBOUNDED_S if self.seconds is None else self.seconds)
        """Its end, and the end of sending."""

    @property
    def wanted(self) -> bool:
        """Whether another task is to be sent now; not where nothing is answered any more: one would only wait."""
        enough = time.monotonic() >= self.high if self.tasks is None else self.claimed >= self.tasks
        return not enough and not self.timed_out

    def send(self, intended: float | None = None) -> Pending:
        """Send the next task."""
        number = self.first_number + self.claimed
        # Counted before it is sent: another user can be next while this one waits for the broker.
        self.claimed += 1
        name, args = (self.work.task_name, (number,)) if self.work else (str(self.task), self.args)
        pending = self.hub.submit(
            name, args, self.kwargs, label=self.task or str(self.workload), number=number, arm=self.arm,
            slice_number=self.number, intended=intended, timeout_s=UNBOUNDED_S, on_end=self._progressed,
        )  # fmt: skip
        self.rows.append(pending.row)
        return pending

    def _progressed(self, _: Pending) -> None:
        self.last_progress = time.monotonic()

    def use(self, number: int) -> None:
        """Be a user: send a task, wait for its end, and so on, until the slice is over."""
        try:
            gevent.sleep(self.ramp_s * number / self.users)
            while self.wanted:
                self.send().wait()
        except Exception as error:
            self.error = error

    def arrive(self, rate_per_s: float, rng: random.Random) -> None:
        """Send tasks when they are due, whatever the worker does; skip those that are overdue by too much."""
        intended = self.begun
        while (intended := intended + rng.expovariate(rate_per_s)) < self.high:
            gevent.sleep(max(0.0, intended - time.monotonic()))
            if (time.monotonic() - intended) * 1000 > self.limit_ms:
                self.skipped += 1
            else:
                self.send(intended)

    def await_end(self) -> None:
        """Wait for the end of sending, then for what is in flight.

        As long as replies come: a backlog takes its time, a worker that hangs answers none.
        """
        if self.tasks is None:
            gevent.sleep(max(0.0, self.high - time.monotonic()))
        while self.wanted and not self._stalled():
            gevent.sleep(0.005)
        if not self.timed_out:
            self.last_progress = time.monotonic()
        self._latest = time.monotonic() + BACKLOG_S
        while not self.hub.drain(DRAIN_STEP_S) and not self._stalled():
            pass
        self.hub.give_up()

    def _stalled(self) -> bool:
        self.timed_out |= time.monotonic() > min(self._latest, self.last_progress + self.drain_s)
        return self.timed_out


class Slices(AbstractContextManager["Slices"]):
    """Executes commands; see the generator's protocol."""

    def __init__(self) -> None:
        self._hubs: dict[str, ReplyHub] = {}
        self._used: Counter[str] = Counter()  # The numbers that an arm's tasks have had: none is used twice
        self._random = random.Random(1)  # noqa: S311 - reproducible, not secret.

    def __exit__(self, *_: object) -> None:
        for hub in self._hubs.values():
            hub.close()

    def execute(self, command: dict[str, Any]) -> dict[str, Any]:
        """Execute one command, and return its answer.

        Raises:
            ValueError: It cannot be understood.
        """
        match command:
            case {"open": {"arm": str(name), "broker_url": broker_url, "reply_url": reply_url, "queue": queue}}:
                if name in self._hubs:
                    raise ValueError(f"The arm {name!r} is open already.")
                self._hubs[name] = ReplyHub.on(broker_url, queue, reply_url)
                # What was imported stays: collections during a slice need not look through it.
                gc.collect()
                gc.freeze()
                return {"opened": name}
            case {"slice": slice_}:
                return self._slice(**slice_)
            case {"close": {"arm": name}}:
                self._hubs.pop(name).close()
                return {"closed": name}
        raise ValueError("The command is none of: open, slice, close.")

    def _slice(self, *, arm: str, first_number: int = 0, **command: Any) -> dict[str, Any]:
        hub, cpu = self._hubs[arm], time.process_time()
        strangers = hub.strangers
        gc.collect()
        load = Load(hub, arm=arm, first_number=max(self._used[arm], first_number), **command)
        users = [] if load.rate_per_s else [gevent.spawn(load.use, number) for number in range(load.users)]
        if load.rate_per_s:
            load.arrive(load.rate_per_s, self._random)
        load.await_end()
        # One that was about to send when the slice ended notices it now.
        load.timed_out |= len(gevent.joinall(users, timeout=load.drain_s)) < len(users)
        gevent.killall(users)
        if load.error is not None:
            raise load.error
        self._used[arm] = load.first_number + load.claimed
        hub.forget()
        cpu_s = round(time.process_time() - cpu, 4)
        rows = [[getattr(row, name) for name in COLUMNS] for row in load.rows]
        return {**summary(load), "strangers": hub.strangers - strangers, "cpu_s": cpu_s, "rows": rows}


def summary(load: Load) -> dict[str, Any]:
    """Return the summary of a slice.

    Closed: of the tasks that ended within the window. Open: `succeeded` likewise, but latencies of those that should
    have been sent within the window, whenever they ended: else a stall at its end would be left out. A task that
    failed as it was meant to counts as succeeded, though not in the latencies.
    """
    rows, low, high, last = load.rows, load.low, load.high, load.high
    if load.tasks is not None:
        low = min((row.sent for row in rows), default=load.begun)
        high, last = max((row.ended for row in rows), default=load.begun), math.inf
    answered = [row for row in rows if row.finals]
    well = [row for row in answered if failure(row, load.work) is None]
    timed = [row for row in well if row.succeeded and low <= (row.intended if load.rate_per_s else row.ended) < last]
    lags = sorted(row.send_lag_ms for row in rows)
    latency = Percentiles.of(row.latency_ms for row in timed)
    uncorrected = Percentiles.of(row.latency_ms - row.send_lag_ms for row in timed)
    return {
        "window": [low, high],
        "tasks": len(rows),
        "succeeded": sum(low <= row.ended < last for row in well),
        "failed": len(answered) - len(well),
        "unanswered": len(rows) - len(answered),
        "late": sum(row.latency_ms > load.limit_ms for row in timed),
        "skipped": load.skipped,
        "latency_ms": asdict(latency) if latency else None,
        "uncorrected_ms": asdict(uncorrected) if uncorrected else None,
        "send_lag_p99_ms": round(nearest_rank(lags, 99), 3) if lags else 0.0,
        "timed_out": load.timed_out,
    }


def main() -> None:
    """Answer commands until the end of stdin."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with Slices() as slices:
        # A plain read of stdin would stop every greenlet.
        answer_lines(FileObject(0, "r", closefd=False), slices.execute)


if __name__ == "__main__":
    main()
