"""What a result directory says, as plain rows: what was right, what was measured, and what may be said about it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from ..bench.results import Arm, Counted, RunFacts, SweepStep, knee_of
from ..client.percentiles import Percentiles
from ..tasks.patterns import OURS
from ..tasks.workloads import HubBlocked
from .statistics import Ratio

BROKEN, BLOCKED = "broken", "driver blocks"


@dataclass(frozen=True, slots=True)
class Breach:
    """An invariant that did not hold."""

    name: str
    detail: str
    batches: tuple[int, ...]  # In which batches; for a sweep, its number


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured of an arm that kept every invariant in every batch: medians over its slices."""

    goodput_per_s: float
    worker_cpu_ms: float | None  # CPU of the worker per task
    database_cpu_ms: float | None
    latency: Percentiles | None  # From the intended send time to the end in the worker; as `phases`
    phases: dict[str, Percentiles]
    """`queue`, `checkout`, `database`, `run`: the median of the batches' percentiles; n is the sum."""
    ratios: dict[str, Ratio]  # To the reference, by metric; none for the reference itself
    generator_share: float  # CPUs of the load generator
    foreign_cpus: float  # CPUs of everything else
    send_lag_p99_ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """One arm of a contest; or of all contests of a worker pool, with the ratios only."""

    arm: Arm
    reference: bool
    breaches: list[Breach]
    speed: Speed | None  # None if it is broken, or was only checked
    unchecked: list[str] = field(default_factory=list)  # What could not be checked, and why
    strategy: str = ""  # The strategy in force, if the pattern is ours
    peak_connections: int = 0  # The most of all batches
    promised_connections: int | None = None
    pss_bytes: float = 0  # Of the batch in which it was measured; 0 if in none
    tasks: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    """Failures by class that the workload did not intend, in all batches."""
    flags: list[str] = field(default_factory=list)  # What to keep in mind when reading the numbers
    log: str = ""
    counted: Counted | None = None  # The sum of all batches of a demo

    @property
    def broken(self) -> bool:
        """Whether an invariant did not hold."""
        return bool(self.breaches)

    @property
    def blocked(self) -> bool:
        """Whether all that is wrong is its driver, which lets no other greenlet run: no load was run, nothing lost."""
        return self.broken and all(breach.detail.startswith(HubBlocked.__name__) for breach in self.breaches)

    @property
    def word(self) -> str:
        """What is said instead of its speed."""
        return BLOCKED if self.blocked else BROKEN

    @property
    def name(self) -> str:
        """`Arm.name`."""
        return self.arm.name

    @property
    def ours(self) -> bool:
        """Whether it is one of our strategies, and no copy."""
        return self.arm.pattern == OURS and not self.arm.copy

    def ratio(self, metric: str) -> Ratio | None:
        """Return the ratio to the reference, if there is one."""
        return self.speed.ratios.get(metric) if self.speed else None


@dataclass(frozen=True, slots=True)
class ContestSummary:
    """Arms under one workload, compared in turns."""

    name: str
    kind: str  # `patterns`, `pools` or `demo`
    pool: str  # The worker pool, if all arms share it
    workload: str
    rows: list[Row]  # The reference first, its copy second, then in the order they were run in the first batch
    workers: int  # Batches: workers are started anew between them
    rounds: int  # Of all batches
    floors: dict[str, float]  # The A/A floor by metric, as a factor; without those that were not measured
    note: str = ""  # What is missing

    @property
    def reference(self) -> Row | None:
        """The row that the others are divided by."""
        return next((row for row in self.rows if row.reference), None)

    def row(self, name: str) -> Row | None:
        """Return the row of an arm."""
        return next((row for row in self.rows if row.name == name), None)


@dataclass(frozen=True, slots=True)
class Standing:
    """One pattern under one worker pool, over all workloads: ratios from all workers of all its contests."""

    pool: str
    arm: Arm
    cells: int  # Workloads it was run with
    broken: int
    blocked: int
    ratios: dict[str, Ratio]


@dataclass(frozen=True, slots=True)
class Knee:
    """A rate that was found by several sweeps."""

    sweeps: int
    middle: float
    low: float
    high: float

    @property
    def coverage(self) -> float:
        """How often the true median is between the least and the most: by the sign test, of any distribution."""
        return 1 - 2.0 ** (1 - self.sweeps)


@dataclass(frozen=True, slots=True)
class SweepSummary:
    """Open loads on one arm: one or several sweeps, step by step."""

    arm: Arm
    workload: str
    steps: list[SweepStep]  # By sweep and offered rate; none if it is broken
    breaches: list[Breach]
    flags: list[str]

    @property
    def sweeps(self) -> list[list[SweepStep]]:
        """The steps of each sweep."""
        numbers = sorted({step.sweep for step in self.steps})
        return [[step for step in self.steps if step.sweep == number] for number in numbers]

    @property
    def kept(self) -> list[SweepStep | None]:
        """Of each sweep the highest step that met the objective, below the first that did not; None if none did."""
        return [knee_of(steps)[0] for steps in self.sweeps]

    @property
    def open_ended(self) -> bool:
        """Whether some sweep ended before the objective broke: the rate is at least this."""
        return any(knee_of(steps)[1] is None and knee_of(steps)[0] for steps in self.sweeps)

    @property
    def knee(self) -> Knee | None:
        """The highest rate that met the objective; 0 for a sweep in which none did; None if nothing was measured."""
        rates = [step.offered_per_s if step else 0.0 for step in self.kept]
        return Knee(len(rates), statistics.median(rates), min(rates), max(rates)) if rates else None


@dataclass(frozen=True, slots=True)
class Summary:
    """What a result directory says."""

    facts: RunFacts
    contests: list[ContestSummary]
    standings: list[Standing]
    sweeps: list[SweepSummary]
    round_trips: dict[str, dict[str, float]]  # Per task, by workload and pattern
    flags: list[str]  # What holds for the run as a whole

    @property
    def measured(self) -> bool:
        """Whether there is any speed, and not only verdicts."""
        return any(row.speed for contest in self.contests for row in contest.rows)

    def of_kind(self, kind: str) -> list[ContestSummary]:
        """Return the contests of one kind."""
        return [contest for contest in self.contests if contest.kind == kind]

    def contest(self, name: str) -> ContestSummary | None:
        """Return a contest by its name."""
        return next((contest for contest in self.contests if contest.name == name), None)
