"""What a Locust run measured: raw values, from which percentiles and thresholds are computed."""

from __future__ import annotations

import time
from array import array
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ..percentiles import Percentiles
from ..replies import Outcome
from ..rows import TaskRow

PHASES = ("queue", "checkout", "database", "run")
LATENCY = "latency"
LAG = "lag"
"""How late a task was sent."""
LATE = 0.1
"""Share of the latency from which on the load generator measures itself."""
_COUNTS = ("ended", "failed", "succeeded", "attempts", "unanswered")


class Records:
    """Eight bytes for each latency and each phase of each successful task; travels from Locust worker to master."""

    def __init__(self) -> None:
        self._values: defaultdict[tuple[str, str], array[float]] = defaultdict(lambda: array("d"))
        self._new: defaultdict[tuple[str, str], array[float]] = defaultdict(lambda: array("d"))
        self.counts = dict.fromkeys(_COUNTS, 0)
        """Tasks that ended, failed, succeeded and stayed unanswered; and attempts, which are units of work."""
        self._new_counts = dict.fromkeys(_COUNTS, 0)
        self.first: float | None = None
        """When the first task was sent, in `time.time()` seconds."""
        self.last: float | None = None
        """When the last one ended."""

    def add(self, name: str, row: TaskRow, failure: Exception | None) -> None:
        """Take in a task that has ended."""
        self._count("ended", 1)
        self._count("attempts", row.attempts)
        self._count("failed" if failure else "succeeded", 1)
        self._count("unanswered", not row.finals)
        now = time.time()
        self._span(now - max(0.0, time.monotonic() - row.intended), now)
        if failure is None and row.outcome == Outcome.SUCCESS:
            self._value(name, LATENCY, row.latency_ms)
            self._value(name, LAG, row.send_lag_ms)
            for phase, milliseconds in phases_of(row).items():
                self._value(name, phase, milliseconds)

    def values(self, phase: str, name: str | None = None) -> list[float]:
        """Return the raw milliseconds of a phase, or `latency`, of one name or of all."""
        return [
            value
            for (of, kind), values in self._values.items()
            if kind == phase and name in {None, of}
            for value in values
        ]

    def names(self) -> list[str]:
        """Return the names of the tasks."""
        return sorted({name for name, _ in self._values})

    @property
    def fail_ratio(self) -> float:
        """Failed tasks, unanswered ones included, among all; 0 of none."""
        return self.counts["failed"] / self.counts["ended"] if self.counts["ended"] else 0.0

    @property
    def seconds(self) -> float:
        """From the first task sent to the last one ended."""
        return (self.last or 0.0) - (self.first or 0.0)

    @property
    def goodput_per_s(self) -> float:
        """Successful tasks per second; 0 of none."""
        return self.counts["succeeded"] / self.seconds if self.seconds else 0.0

    @property
    def generator_lag_ms(self) -> float | None:
        """The p99 of how late tasks were sent, if that is more than a tenth of the median latency; else None."""
        lag, latency = Percentiles.of(self.values(LAG)), Percentiles.of(self.values(LATENCY))
        return lag.p99 if lag and latency and lag.p99 > LATE * latency.p50 else None

    def take_new(self) -> dict[str, Any]:
        """Return what came in since the last call, for `merge` in another process."""
        new = {
            "values": [[*key, values.tobytes()] for key, values in self._new.items()],
            "counts": self._new_counts,
            "span": [self.first, self.last],
        }
        self._new.clear()
        self._new_counts = dict.fromkeys(_COUNTS, 0)
        return new

    def merge(self, new: Mapping[str, Any]) -> None:
        """Take in what another process returned from `take_new`."""
        for name, phase, values in new["values"]:
            self._values[name, phase].frombytes(values)
        for key, number in new["counts"].items():
            self.counts[key] += number
        if new["span"][0] is not None:
            self._span(*new["span"])

    def _count(self, key: str, number: int) -> None:
        self.counts[key] += number
        self._new_counts[key] += number

    def _span(self, first: float, last: float) -> None:
        self.first = first if self.first is None else min(self.first, first)
        self.last = last if self.last is None else max(self.last, last)

    def _value(self, name: str, phase: str, milliseconds: float) -> None:
        self._values[name, phase].append(milliseconds)
        self._new[name, phase].append(milliseconds)


def phases_of(row: TaskRow) -> dict[str, float]:
    """Return the milliseconds of each phase that was measured; events do not tell of the database."""
    phases = {"queue": row.queue_ms, "run": row.run_ms}
    if row.checkout_ms or row.database_ms:
        phases |= {"checkout": row.checkout_ms, "database": row.database_ms}
    return phases
