"""What a result directory says, as plain rows: what was right, what was measured, and what may be said about it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..bench.objective import Objective
from ..bench.results import Arm, Batch, RunFacts, SweepStep
from ..percentiles import Percentiles
from ..workloads import HubBlocked
from .statistics import METRICS, Estimate, Ratio, compare_pairs, paired_ratios

BROKEN, BLOCKED = "broken", "driver blocks"


@dataclass(frozen=True, slots=True)
class Breach:
    """An invariant that did not hold."""

    name: str
    detail: str
    batches: tuple[int, ...]
    """In which batches; none for a sweep."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured of an arm that kept every invariant in every batch."""

    goodput_per_s: Estimate
    """Over its slices."""
    worker_cpu_ms: float | None
    """CPU of the worker per task: the median over its slices."""
    database_cpu_ms: float | None
    latency: Percentiles | None
    """From the intended send time to the end in the worker; as `phases`."""
    phases: dict[str, Percentiles]
    """`queue`, `checkout`, `database`, `run`: the median of the batches' percentiles; n is the sum."""
    ratios: dict[str, Ratio]
    """To the reference, by metric; none for the reference itself."""
    generator_share: float
    """CPUs of the load generator, the median over the slices."""
    foreign_cpus: float
    """CPUs of everything else, the median over the slices."""
    send_lag_p99_ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """One arm of a contest."""

    arm: Arm
    reference: bool
    breaches: list[Breach]
    unchecked: list[str]
    """What could not be checked, and why."""
    strategy: str
    """The strategy in force, if the pattern is ours."""
    reason: str
    speed: Speed | None
    """None if it is broken, or was only checked."""
    peak_connections: int
    """The most of all batches."""
    promised_connections: int | None
    pss_bytes: float
    """Of the batch in which it was measured; 0 if in none."""
    start_s: float
    tasks: int
    errors: dict[str, int]
    """Failures by class that the workload did not intend, in all batches."""
    flags: list[str]
    """What to keep in mind when reading the numbers."""
    log: str = ""

    @property
    def broken(self) -> bool:
        """Whether an invariant did not hold."""
        return bool(self.breaches)

    @property
    def blocked(self) -> bool:
        """Whether all that is wrong is its driver, which lets no other greenlet run: no load was run, nothing was "
        "lost."""
        return self.broken and all(breach.detail.startswith(HubBlocked.__name__) for breach in self.breaches)

    @property
    def word(self) -> str:
        """What is said instead of its speed."""
        return BLOCKED if self.blocked else BROKEN

    @property
    def name(self) -> str:
        """`Arm.name`."""
        return self.arm.name

    def ratio(self, metric: str) -> Ratio | None:
        """Return the ratio to the reference, if there is one."""
        return self.speed.ratios.get(metric) if self.speed else None


@dataclass(frozen=True, slots=True)
class ContestSummary:
    """Arms under one workload, compared in turns."""

    name: str
    kind: str
    """`patterns` or `pools`."""
    pool: str
    """The worker pool, if all arms share it."""
    workload: str
    rows: list[Row]
    """In the order they were run in the first batch, the reference first, its copy second."""
    batches: int
    rounds: int
    """Of all batches."""
    floors: dict[str, float]
    """The A/A floor by metric, as a factor; without those that were not measured."""
    note: str = ""
    """What is missing."""
    pairs: list[Batch] = field(default_factory=list, repr=False)
    """The batches themselves, to compare any two arms."""

    @property
    def reference(self) -> Row | None:
        """The row that the others are divided by."""
        return next((row for row in self.rows if row.reference), None)

    def row(self, name: str) -> Row | None:
        """Return the row of an arm."""
        return next((row for row in self.rows if row.name == name), None)

    def compare(self, arm: str, other: str, metric: str) -> Ratio | None:
        """Compare any two arms that ran in the same rounds."""
        pairs = paired_ratios(self.pairs, arm, other, METRICS[metric])
        return compare_pairs(pairs, METRICS[metric], self.floors.get(metric))


@dataclass(frozen=True, slots=True)
class SweepSummary:
    """An open load on one arm, step by step."""

    arm: Arm
    workload: str
    steps: list[SweepStep]
    """By offered rate; none if it is broken."""
    breaches: list[Breach]
    at_objective: SweepStep | None
    """The highest step that met the objective, below the first that did not."""
    knee: SweepStep | None
    """The first step that did not meet it; None if all did."""
    flags: list[str]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a result directory says."""

    facts: RunFacts
    contests: list[ContestSummary]
    sweeps: list[SweepSummary]
    round_trips: dict[str, dict[str, float]]
    """Per task, by workload and pattern."""
    flags: list[str]
    """What holds for the run as a whole."""

    @property
    def measured(self) -> bool:
        """Whether there is any speed, and not only verdicts."""
        return any(row.speed for contest in self.contests for row in contest.rows)

    @property
    def workloads(self) -> list[str]:
        """The workloads, in the order they were run."""
        found = [*(contest.workload for contest in self.contests), *(sweep.workload for sweep in self.sweeps)]
        order = list(self.facts.workloads)
        return sorted(dict.fromkeys(found), key=lambda name: order.index(name) if name in order else len(order))

    @property
    def objective(self) -> Objective | None:
        """What the sweeps were held against."""
        return Objective.parse(self.facts.objective) if self.facts.objective else None

    def contest(self, name: str) -> ContestSummary | None:
        """Return a contest by its name."""
        return next((contest for contest in self.contests if contest.name == name), None)
