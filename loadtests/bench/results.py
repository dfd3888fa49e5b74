"""What a benchmark run keeps: plain facts in one SQLite file, from which every report is computed.

run.sqlite       tables `run`, `batches`, `cells`, `slices`, `steps`; what is not plain is JSON
tasks/*.csv.gz   every task of every batch and sweep (`rows.TaskRow`)
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import click

from ..errors import LoadTestError
from .rows import Percentiles

RUN_FILE, TASKS_DIRECTORY = "run.sqlite", "tasks"


class NoRunError(LoadTestError, click.UsageError):
    """The directory holds no run; a command that was given it ends with 2."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the workload: what is compared with what."""

    pool: str
    concurrency: int
    pattern: str  # `celery-alchemy` or the name of a baseline
    strategy: str = ""
    """Session strategy that was asked for, if the pattern is ours: `auto`, `local`, `scoped`, `per_process`."""
    copy: int = 0  # 1 for the A/A arm: the same as the reference in everything

    @property
    def label(self) -> str:
        """What people read: the pattern, and our strategy."""
        name = f"{self.pattern} {self.strategy}" if self.strategy else self.pattern
        return f"{name} (again)" if self.copy else name

    @property
    def name(self) -> str:
        """Unique within a contest; letters, digits, `-` and `_` only."""
        strategy = f"-{self.strategy.replace(':', '_').replace('.', '_')}" if self.strategy else ""
        return f"{self.pool}-{self.concurrency}-{self.pattern}{strategy}{'-copy' if self.copy else ''}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One invariant of a cell."""

    name: str
    passed: bool
    detail: str = ""  # What was found instead; or why it could not be checked, if `passed` and not empty


@dataclass(frozen=True, slots=True)
class Counted:
    """A fixed load, counted task by task against the database: what a demo shows."""

    sent: int
    right: int
    """Answered once, ended as they were meant to, and the database holds what they say, and nothing else of them."""
    wrong: int
    unanswered: int
    connections_left: int  # Connections in a transaction or checked out after the last answer
    seconds: float  # From the first send to the last answer, or until no more was waited for
    worker_cpu_s: float


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm in one batch: a worker of its own on a database, a queue and a reply list of its own."""

    arm: Arm
    verdicts: list[Verdict]
    strategy: str = ""  # The strategy in force, if the pattern is ours
    reason: str = ""  # Why that one
    start_s: float = 0.0
    promised_connections: int | None = None
    peak_connections: int = 0
    pss_bytes: int = 0
    """Proportional set size of the worker's processes, after the load of the first batch; 0: not measured."""
    phases: dict[str, Percentiles] = field(default_factory=dict)
    """`queue`, `checkout`, `database`, `run`, `latency`: of the successful tasks of its slices."""
    errors: dict[str, int] = field(default_factory=dict)  # Failures by class that the workload did not intend
    tasks: int = 0
    log: str = ""  # The end of the worker's log, if a verdict is no
    counted: Counted | None = None  # Of a contest `demo/<worker pool>`

    @property
    def broken(self) -> list[Verdict]:
        """The invariants that did not hold."""
        return [verdict for verdict in self.verdicts if not verdict.passed]


@dataclass(frozen=True, slots=True)
class Slice:
    """One arm under load for about a second, in its turn."""

    number: int  # Unique in the run: `TaskRow.slice`
    round: int  # Slices of one round of one batch are compared with each other
    position: int  # Its turn within the round, from 0
    arm: str  # `Arm.name`
    seconds: float  # Length of the measured window; successes are counted by the time they ended
    succeeded: int
    failed: int
    unanswered: int
    tasks: int  # All tasks of the slice, those of its ramp and its end too: what the CPU seconds were spent on
    latency: Percentiles | None
    worker_cpu_s: float
    database_cpu_s: float | None  # None where the database server is not on this machine or not ours to see
    generator_cpu_s: float
    foreign_cpus: float  # CPUs that everything else on the machine was busy on, on average
    wall_s: float  # Length of the slice with ramp and end
    send_lag_p99_ms: float = 0.0

    @property
    def goodput_per_s(self) -> float:
        """Successful tasks per second of the window."""
        return self.succeeded / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Batch:
    """A contest between arms on one workload, from the start of the workers to their end."""

    contest: str
    """`patterns/<pool>/<workload>` (one worker pool, all patterns), `pools/<workload>` (all pools, strategy auto) or
    `demo/<pool>` (the recipe and ours, counted)."""
    number: int  # From 1; workers are started anew for each batch
    workload: str
    reference: str  # `Arm.name` of what the others are divided by
    cells: list[Cell]
    slices: list[Slice]
    begun: str = ""  # ISO 8601, UTC
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SweepStep:
    """An open load on one arm: arrivals at a rate, whatever the worker does."""

    arm: Arm
    workload: str
    offered_per_s: float
    seconds: float
    achieved_per_s: float  # Successful tasks that ended within the window, per second
    failed: int
    unanswered: int
    latency: Percentiles | None  # Corrected: from the intended send time
    foreign_cpus: float
    peak_connections: int
    send_lag_p99_ms: float
    met: bool  # Whether the objective held: the latency percentile within the limit, no error, nothing unanswered
    verdicts: list[Verdict] = field(default_factory=list)  # Of the whole sweep of this arm, on its last step only
    sweep: int = 1  # Number of the sweep of this arm and workload, from 1
    slice: int = 0  # `TaskRow.slice` of its tasks
    uncorrected: Percentiles | None = None
    """Latency from the real send time: what a generator that waits would have reported."""
    late: int = 0  # Tasks that were answered later than the objective allows
    skipped: int = 0  # Arrivals that were not sent, because they were due longer ago than the objective allows


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the numbers depend on."""

    command: str
    begun: str
    options: dict[str, Any]
    """Every option of the run that results depend on: a run can only be resumed with the same ones."""
    services: list[str]
    versions: dict[str, str]
    machine: dict[str, str]  # `cpu`, `cpus`, `memory`, `system`, `python`
    workloads: dict[str, str]  # Name and one sentence
    patterns: dict[str, str]  # Name and one sentence
    objective: str = ""  # Of the sweeps, such as `p95=50ms`
    round_trips: dict[str, dict[str, float]] = field(default_factory=dict)
    """Per task, by workload and pattern, as a proxy counted them; empty if it did not."""

    def write(self, directory: Path) -> None:
        """Write the table `run`."""
        with opened(directory, write=True) as connection:
            rows = [(name, json.dumps(value)) for name, value in asdict(self).items()]
            connection.executemany("INSERT OR REPLACE INTO run VALUES (?, ?)", rows)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the table `run`.

        Raises:
            NoRunError: There is no run in the directory.
        """
        with opened(directory) as connection:
            found = {row["name"]: json.loads(row["value"]) for row in connection.execute("SELECT * FROM run")}
        return cls(**{one.name: found[one.name] for one in fields(cls) if one.name in found})


@dataclass(frozen=True, slots=True)
class Objective:
    """What users are promised: a latency percentile and its limit."""

    percentile: str  # `p50`, `p95` or `p99`
    limit_ms: float

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Return the objective behind `p95=50ms` or `p99=0.2s`.

        Raises:
            ValueError: It is not spelled like that.
        """
        match = re.fullmatch(r"(p50|p95|p99)=(\d+(?:\.\d+)?)(ms|s)", text.strip())
        if not match or not float(match[2]):
            raise ValueError(f"{text!r} is not a latency objective: write for example p95=50ms.")
        return cls(match[1], float(match[2]) * (1000 if match[3] == "s" else 1))

    def met(self, latency: Percentiles | None) -> bool:
        """Return whether the percentile is within the limit."""
        return latency is not None and float(getattr(latency, self.percentile)) <= self.limit_ms

    def __str__(self) -> str:
        return f"{self.percentile}={self.limit_ms:g}ms"


def knee_of(steps: Iterable[SweepStep]) -> tuple[SweepStep | None, SweepStep | None]:
    """Return the last step of one sweep that met the objective before any did not, and the first that did not."""
    kept = None
    for step in sorted(steps, key=lambda one: one.offered_per_s):
        if not step.met:
            return kept, step if step.offered_per_s else None
        kept = step
    return kept, None


def read_batches(directory: Path) -> Iterator[Batch]:
    """Yield the finished batches, in the order they were run."""
    cells: defaultdict[tuple[str, int], list[Cell]] = defaultdict(list)
    slices: defaultdict[tuple[str, int], list[Slice]] = defaultdict(list)
    with opened(directory) as connection:
        for row, cell in _read(connection, "cells"):
            cells[row["contest"], row["batch"]].append(cell)
        for row, one in _read(connection, "slices"):
            slices[row["contest"], row["batch"]].append(one)
        batches = [dict(row) for row in connection.execute("SELECT * FROM batches ORDER BY rowid")]
    for batch in batches:
        key = batch["contest"], batch["number"]
        yield Batch(**batch, cells=cells[key], slices=slices[key])


def read_sweep(directory: Path) -> Iterator[SweepStep]:
    """Yield the steps of all sweeps, in the order they were run."""
    with opened(directory) as connection:
        steps = [step for _, step in _read(connection, "steps")]
    yield from steps


TABLES: dict[str, type[Any]] = {"batches": Batch, "cells": Cell, "slices": Slice, "steps": SweepStep}
PARTS = ("cells", "slices")  # Of a batch: tables of their own, whose rows begin with what they belong to
MAKE: dict[Any, Any] = {
    "bool": bool,
    "Arm": lambda text: Arm(**json.loads(text)),
    "list[Verdict]": lambda text: [Verdict(**one) for one in json.loads(text)],
    "dict[str, Percentiles]": lambda text: {name: Percentiles(**one) for name, one in json.loads(text).items()},
    "dict[str, int]": json.loads,
    "Percentiles | None": lambda text: Percentiles(**json.loads(text)),
    "Counted | None": lambda text: Counted(**json.loads(text)),
}
"""How a field of this type is made from what SQLite has of it; others are kept as they are."""


def _schema() -> Iterator[str]:
    yield "run (name PRIMARY KEY, value)"
    for table, kind in TABLES.items():
        names = [one.name for one in fields(kind) if one.name not in PARTS]
        key = ["PRIMARY KEY (contest, number)"] if kind is Batch else []
        yield f"{table} ({', '.join([*(('contest', 'batch') if table in PARTS else ()), *names, *key])})"


@contextmanager
def opened(directory: Path, *, write: bool = False) -> Iterator[sqlite3.Connection]:
    """Open the file of a run; what the block writes is one transaction, with the tables if there are none yet.

    Raises:
        NoRunError: There is none, and it is only read.
    """
    path = (directory / RUN_FILE).resolve()
    if not write and not (path.exists() and path.stat().st_size):  # One without tables is being made.
        raise NoRunError(f"{directory} holds no run of the benchmark: there is no {RUN_FILE} in it.")
    address = f"{path.as_uri()}?mode={'rwc' if write else 'ro'}"
    with closing(sqlite3.connect(address, uri=True, isolation_level=None)) as connection:
        connection.row_factory = sqlite3.Row
        if write:
            connection.execute("BEGIN IMMEDIATE")
            for table in _schema():
                connection.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        with connection:
            yield connection


def insert(connection: sqlite3.Connection, table: str, item: Any, **key: Any) -> None:
    """Write one dataclass as one row, with the key of what it belongs to."""
    values = {**key, **{name: value for name, value in asdict(item).items() if name not in PARTS}}
    encoded = [json.dumps(one) if isinstance(one, dict | list) else one for one in values.values()]
    marks = ", ".join("?" * len(values))
    connection.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", encoded)  # noqa: S608


def _read(connection: sqlite3.Connection, table: str) -> Iterator[tuple[sqlite3.Row, Any]]:
    """Yield each row, and what it was made of; a file of an older version lacks the younger columns."""
    for row in connection.execute(f"SELECT * FROM {table} ORDER BY rowid"):  # noqa: S608 - our own name.
        values = {one.name: (one.type, row[one.name]) for one in fields(TABLES[table]) if one.name in set(row.keys())}
        made = {
            name: MAKE[kind](value) if kind in MAKE and value is not None else value
            for name, (kind, value) in values.items()
        }
        yield row, TABLES[table](**made)
