"""What a benchmark run keeps: plain facts, one JSON line per finished batch, from which every report is computed.

run.json         what was run, on what, with what (`RunFacts`)
batches.jsonl    one line per finished batch of a contest (`Batch`); an interrupted run goes on after the last
sweep.jsonl      one line per step of an open-load sweep (`SweepStep`)
round_trips.json round trips per task by workload and pattern, counted by a proxy
tasks/*.csv.gz   every task of every batch (`rows.TaskRow`)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from ..percentiles import Percentiles

RUN_FILE, BATCHES_FILE, SWEEP_FILE, ROUND_TRIPS_FILE, TASKS_DIRECTORY = (
    "run.json", "batches.jsonl", "sweep.jsonl", "round_trips.json", "tasks",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the workload: what is compared with what."""

    pool: str
    concurrency: int
    pattern: str
    """`celery-alchemy` or the name of a baseline."""
    strategy: str = ""
    """Session strategy that was asked for, if the pattern is ours: `auto`, `local`, `scoped`, `per_process`."""
    copy: int = 0
    """1 for the A/A arm: the same as the reference in everything."""

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
    detail: str = ""
    """What was found instead; or why it could not be checked, if `passed` and not empty."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm in one batch: a worker of its own on a database, a queue and a reply list of its own."""

    arm: Arm
    verdicts: list[Verdict]
    strategy: str = ""
    """The strategy in force, if the pattern is ours."""
    reason: str = ""
    """Why that one."""
    start_s: float = 0.0
    promised_connections: int | None = None
    peak_connections: int = 0
    peak_idle_in_transaction: int = 0
    pss_bytes: int = 0
    """Proportional set size of the worker's processes, after the load of the first batch; 0: not measured."""
    phases: dict[str, Percentiles] = field(default_factory=dict)
    """`queue`, `checkout`, `database`, `run`, `latency`: of the successful tasks of its slices."""
    errors: dict[str, int] = field(default_factory=dict)
    """Failures by class that the workload did not intend."""
    tasks: int = 0
    log: str = ""
    """The end of the worker's log, if a verdict is no."""

    @property
    def broken(self) -> list[Verdict]:
        """The invariants that did not hold."""
        return [verdict for verdict in self.verdicts if not verdict.passed]


@dataclass(frozen=True, slots=True)
class Slice:
    """One arm under load for about a second, in its turn."""

    number: int
    """Unique in the run: `TaskRow.slice`."""
    round: int
    """Slices of one round of one batch are compared with each other."""
    position: int
    """Its turn within the round, from 0."""
    arm: str
    """`Arm.name`."""
    seconds: float
    """Length of the measured window; successes are counted by the time they ended."""
    succeeded: int
    failed: int
    unanswered: int
    tasks: int
    """All tasks of the slice, those of its ramp and its end too: what the CPU seconds were spent on."""
    latency: Percentiles | None
    worker_cpu_s: float
    database_cpu_s: float | None
    """None where the database server is not on this machine or not ours to see."""
    generator_cpu_s: float
    foreign_cpus: float
    """CPUs that everything else on the machine was busy on, on average."""
    wall_s: float
    """Length of the slice with ramp and end."""
    send_lag_p99_ms: float = 0.0

    @property
    def goodput_per_s(self) -> float:
        """Successful tasks per second of the window."""
        return self.succeeded / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Batch:
    """A contest between arms on one workload, from the start of the workers to their end."""

    contest: str
    """`patterns/<pool>/<workload>` (one worker pool, all patterns) or `pools/<workload>` (all pools, strategy auto)."""
    number: int
    """From 1; workers are started anew for each batch."""
    workload: str
    reference: str
    """`Arm.name` of what the others are divided by."""
    cells: list[Cell]
    slices: list[Slice]
    begun: str = ""
    """ISO 8601, UTC."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SweepStep:
    """An open load on one arm: arrivals at a rate, whatever the worker does."""

    arm: Arm
    workload: str
    offered_per_s: float
    seconds: float
    achieved_per_s: float
    """Successful tasks that ended within the window, per second."""
    failed: int
    unanswered: int
    latency: Percentiles | None
    """From the intended send time."""
    worker_cpus: float
    foreign_cpus: float
    peak_connections: int
    send_lag_p99_ms: float
    met: bool
    """Whether the objective held: the latency percentile within the limit, no error, nothing unanswered."""
    verdicts: list[Verdict] = field(default_factory=list)
    """Of the whole sweep of this arm, on its last step only."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the numbers depend on."""

    command: str
    begun: str
    options: dict[str, Any]
    """Every option of the run that results depend on: a run can only be resumed with the same ones."""
    services: list[str]
    versions: dict[str, str]
    machine: dict[str, str]
    """`cpu`, `cpus`, `memory`, `system`, `python`."""
    workloads: dict[str, str]
    """Name and one sentence."""
    patterns: dict[str, str]
    """Name and one sentence."""
    objective: str = ""
    """Of the sweeps, such as `p95=50ms`."""

    def write(self, directory: Path) -> None:
        """Write `run.json`."""
        (directory / RUN_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read `run.json`."""
        return cls(**json.loads((directory / RUN_FILE).read_text()))


def knee_of(steps: Iterable[SweepStep]) -> tuple[SweepStep | None, SweepStep | None]:
    """Return the last step that met the objective before any did not, and the first that did not: the knee."""
    kept = None
    for step in sorted(steps, key=lambda one: one.offered_per_s):
        if not step.met:
            return kept, step if step.offered_per_s else None
        kept = step
    return kept, None


def to_json(item: Batch | SweepStep) -> str:
    """Encode for one line of `batches.jsonl` or `sweep.jsonl`."""
    return json.dumps(asdict(item), separators=(",", ":"))


def read_batches(directory: Path) -> Iterator[Batch]:
    """Yield the finished batches, in the order they were run; a last line cut short by a crash is left out."""
    for line in _lines(directory / BATCHES_FILE):
        fields = json.loads(line)
        cells = [_cell(cell) for cell in fields.pop("cells")]
        slices = [Slice(**{**item, "latency": _percentiles(item["latency"])}) for item in fields.pop("slices")]
        yield Batch(**fields, cells=cells, slices=slices)


def read_sweep(directory: Path) -> Iterator[SweepStep]:
    """Yield the steps of all sweeps, in the order they were run."""
    for line in _lines(directory / SWEEP_FILE):
        fields = json.loads(line)
        yield SweepStep(
            **{
                **fields,
                "arm": Arm(**fields["arm"]),
                "latency": _percentiles(fields["latency"]),
                "verdicts": [Verdict(**verdict) for verdict in fields["verdicts"]],
            }
        )


def _lines(path: Path) -> Iterator[str]:
    if path.exists():
        yield from (line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))


def _cell(fields: dict[str, Any]) -> Cell:
    return Cell(
        **{
            **fields,
            "arm": Arm(**fields["arm"]),
            "verdicts": [Verdict(**verdict) for verdict in fields["verdicts"]],
            "phases": {name: Percentiles(**values) for name, values in fields["phases"].items()},
        }
    )


def _percentiles(fields: dict[str, Any] | None) -> Percentiles | None:
    return Percentiles(**fields) if fields else None
