"""One row per task, which the load generator writes down, and exact percentiles of what rows say."""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import IO, Self

from ..tasks.replies import Outcome

UNANSWERED = "unanswered"  # The outcome of a task to which no final reply came


@dataclass(slots=True)
class TaskRow:
    """A task that was sent, and how it ended. Times are `time.monotonic()` seconds of one host."""

    slice: int  # Number of the slice it was sent in; 0 outside the benchmark
    arm: str  # Name of the arm, as in `Arm.name`
    workload: str
    number: int  # The task's argument, from which the workload derives everything it does
    task_id: str
    intended: float  # When it should have been sent; later than `sent` never, earlier when the generator was behind
    sent: float  # Just before it was published
    started: float  # When its last attempt began in the worker; 0 if unanswered
    ended: float  # When its last attempt ended in the worker; 0 if unanswered
    outcome: str  # `success`, `failure` or `unanswered`
    attempts: int  # Replies to it; 2 for a task that retried once
    checkout_ms: float  # Waiting for a connection of the connection pool, connecting included, in the last attempt
    database_ms: float  # In the driver: statements, COMMIT and ROLLBACK, in the last attempt
    finals: int = 1  # Final replies; more than 1 is a task that ran twice
    pid: int = 0
    breach: str = ""  # What the worker saw to be wrong with its Session: shared, or inherited in mid-transaction
    error_type: str = ""
    error: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether the worker says that it was committed."""
        return self.outcome == Outcome.SUCCESS

    @property
    def latency_ms(self) -> float:
        """From the intended send time to the end in the worker: a stall of generator or worker is not omitted."""
        return (self.ended - self.intended) * 1000

    @property
    def queue_ms(self) -> float:
        """From publishing to the begin of the last attempt."""
        return (self.started - self.sent) * 1000

    @property
    def run_ms(self) -> float:
        """The last attempt."""
        return (self.ended - self.started) * 1000

    @property
    def send_lag_ms(self) -> float:
        """How far the generator was behind."""
        return (self.sent - self.intended) * 1000


COLUMNS = tuple(field.name for field in fields(TaskRow))
_TYPES = tuple({"int": int, "float": float, "str": str}[str(field.type)] for field in fields(TaskRow))


def write_rows(file: IO[str], rows: Iterable[TaskRow], *, header: bool = False) -> None:
    """Append rows to a CSV file and flush; times to a microsecond, a hundred times finer than what is reported."""
    writer = csv.writer(file)
    if header:
        writer.writerow(COLUMNS)
    for row in rows:
        values = (getattr(row, name) for name in COLUMNS)
        writer.writerow(f"{value:.6f}" if isinstance(value, float) else value for value in values)
    file.flush()


def read_rows(path: Path) -> Iterator[TaskRow]:
    """Yield the rows of a file with a header, packed or not."""
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
        next(csv.reader(file), None)
        yield from parse_rows(file)


def parse_rows(file: IO[str]) -> Iterator[TaskRow]:
    """Yield the rows of an open file, from where it stands."""
    for cells in csv.reader(file):
        yield TaskRow(*(convert(cell) for convert, cell in zip(_TYPES, cells, strict=True)))


def nearest_rank(ordered: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of sorted values do not exceed; NaN of nothing."""
    if not ordered:
        return math.nan
    # Rounded first: 0.07 * 100 is 7.000000000000001, which would be rank 8.
    rank = math.ceil(round(percent / 100 * len(ordered), 9))
    return ordered[max(rank, 1) - 1]


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Nearest-rank percentiles over raw values, in milliseconds, rounded to 0.01 ms."""

    n: int
    p50: float
    p95: float
    p99: float
    max: float
    p999: float | None = None
    """None in results that were kept before it was."""

    @classmethod
    def of(cls, values_ms: Iterable[float]) -> Self | None:
        """Return the percentiles of raw values; None of nothing."""
        ordered = sorted(values_ms)
        if not ordered:
            return None
        p50, p95, p99, p999 = (round(nearest_rank(ordered, percent), 2) for percent in (50, 95, 99, 99.9))
        return cls(len(ordered), p50, p95, p99, round(ordered[-1], 2), p999)

    @classmethod
    def middle(cls, found: Sequence[Self]) -> Self | None:
        """Return the median of each percentile: raw values of several workers are not one distribution."""
        if not found:
            return None
        p50, p95, p99 = (round(median(getattr(one, name) for one in found), 2) for name in ("p50", "p95", "p99"))
        p999 = [one.p999 for one in found if one.p999 is not None]
        most = max(one.max for one in found)
        return cls(sum(one.n for one in found), p50, p95, p99, most, median(p999) if p999 else None)
