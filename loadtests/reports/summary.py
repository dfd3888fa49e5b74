"""What a result directory says, as plain rows: what was right, what was measured, and what may be said about it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from ..bench import results
from ..bench.results import Arm, Batch, Cell, Counted, RunFacts, Slice, SweepStep, Verdict
from ..bench.rows import Percentiles
from ..tasks.workloads import HubBlocked
from .statistics import METRICS, Groups, Ratio, estimate, judged, middle_of, noise_floor, paired_ratios
from .wording import number

BROKEN, BLOCKED, REFERENCE = "broken", "driver blocks", "is 1"
FOREIGN_CPUS = 0.3  # More than this many CPUs busy with something else, and a row is marked
GENERATOR_SHARE = 0.8  # A load generator that is busier than this measures itself
SEND_LAG = 0.1  # So does one that sends later than it should by more than this share of the median latency
CHECKOUT_SHARE = 0.1
"""Tasks that wait longer than this share of their run for a connection may want a larger connection pool."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured of an arm that kept every invariant in every batch: medians over its slices."""

    goodput_per_s: float
    worker_cpu_ms: float | None  # CPU of the worker per task
    database_cpu_ms: float | None
    latency: Percentiles | None  # From the intended send time to the end in the worker; as `phases`
    phases: dict[str, Percentiles]
    """`queue`, `checkout`, `database`, `run`: the median of the batches' percentiles; n is the sum."""
    foreign_cpus: float  # CPUs of everything that is not ours
    flags: list[str]  # What to keep in mind when reading the numbers


@dataclass(frozen=True, slots=True)
class Row:
    """One arm of a contest."""

    arm: Arm
    reference: bool
    cells: list[Cell]  # Its workers, one for each batch
    speed: Speed | None  # None if it is broken, or was only checked
    ratios: dict[str, Ratio]  # To the reference, by metric; none for the reference itself, and where one is broken

    @property
    def breaches(self) -> list[Verdict]:
        """Each invariant that did not hold, once."""
        return first_breaches(verdict for cell in self.cells for verdict in cell.verdicts)

    @property
    def counted(self) -> Counted | None:
        """What a demo counted, all its restarts together."""
        counted = [astuple(cell.counted) for cell in self.cells if cell.counted]
        # Rounded as each is: `sum` adds floating-point numbers otherwise from Python 3.12 on.
        return Counted(*(round(sum(ones), 3) for ones in zip(*counted, strict=True))) if counted else None

    def most(self, name: str) -> Any:
        """Return the most of all its cells; None where none has it."""
        return max((value for cell in self.cells if (value := getattr(cell, name)) is not None), default=None)

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
        """What is said instead of a ratio."""
        return BLOCKED if self.blocked else BROKEN if self.broken else REFERENCE if self.reference else ""


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
    note: str  # What is missing

    @property
    def reference(self) -> Row:
        """The row that the others are divided by."""
        return next(row for row in self.rows if row.reference)

    def row(self, name: str) -> Row | None:
        """Return the row of an arm."""
        return next((row for row in self.rows if row.arm.name == name), None)


@dataclass(frozen=True, slots=True)
class Standing:
    """One pattern under one worker pool, over all workloads: ratios from all workers of all its contests."""

    pool: str
    arm: Arm
    cells: int  # Workloads it was run with
    broken: int
    blocked: int
    ratios: dict[str, Ratio]

    @property
    def word(self) -> str:
        """What is said instead of a ratio."""
        return BROKEN if self.broken else BLOCKED if self.blocked else REFERENCE


@dataclass(frozen=True, slots=True)
class Knee:
    """A rate that was found by several sweeps."""

    sweeps: int
    middle: float
    low: float
    high: float
    open_ended: bool  # Whether some sweep ended before the objective broke: the rate is at least this

    @property
    def coverage(self) -> float:
        """How often the true median is between the least and the most: by the sign test, of any distribution."""
        return 1 - 2.0 ** (1 - self.sweeps)

    def __str__(self) -> str:
        return number(self.middle) + (f" [{number(self.low)}, {number(self.high)}]" if self.sweeps > 1 else "")


@dataclass(frozen=True, slots=True)
class SweepSummary:
    """Open loads on one arm: one or several sweeps, step by step."""

    arm: Arm
    workload: str
    kept_steps: list[SweepStep]

    @property
    def breaches(self) -> list[Verdict]:
        """Each invariant that did not hold, once."""
        return first_breaches(verdict for step in self.kept_steps for verdict in step.verdicts)

    @property
    def steps(self) -> list[SweepStep]:
        """What was measured, by sweep and offered rate; nothing if it is broken."""
        measured = [] if self.breaches else [step for step in self.kept_steps if step.offered_per_s]
        return sorted(measured, key=lambda one: (one.sweep, one.offered_per_s))

    @property
    def sweeps(self) -> list[list[SweepStep]]:
        """The steps of each sweep."""
        numbers = sorted({step.sweep for step in self.steps})
        return [[step for step in self.steps if step.sweep == number] for number in numbers]

    @property
    def kept(self) -> list[SweepStep | None]:
        """Of each sweep the highest step that met the objective, below the first that did not; None if none did."""
        return [results.knee_of(steps)[0] for steps in self.sweeps]

    @property
    def knee(self) -> Knee | None:
        """The highest rate that met the objective; 0 for a sweep in which none did; None if nothing was measured."""
        found = [results.knee_of(steps) for steps in self.sweeps]
        rates = [kept.offered_per_s if kept else 0.0 for kept, _ in found]
        open_ended = any(kept and not beyond for kept, beyond in found)
        return Knee(len(rates), statistics.median(rates), min(rates), max(rates), open_ended) if rates else None

    @property
    def flags(self) -> list[str]:
        """What to keep in mind when reading the numbers."""
        foreign = middle_of(step.foreign_cpus for step in self.steps) or 0.0
        lags = [step.send_lag_p99_ms for step in self.kept if step and step.latency
                and step.send_lag_p99_ms > max(SEND_LAG * step.latency.p50, 1.0)]  # fmt: skip
        return [
            *([f"foreign CPU: something else kept {foreign:.1f} CPUs busy"] if foreign > FOREIGN_CPUS else []),
            *([f"generator-bound: sends were up to {max(lags):.1f} ms late (p99)"] if lags else []),
        ]

    def latency(self, which: str) -> Percentiles | None:
        """Return the median of each percentile at the kept steps; `which` is `latency` or `uncorrected`."""
        return Percentiles.middle([found for step in self.kept if step and (found := getattr(step, which))])


@dataclass(frozen=True, slots=True)
class Summary:
    """What a result directory says."""

    facts: RunFacts
    contests: list[ContestSummary]
    standings: list[Standing]
    sweeps: list[SweepSummary]
    batches: dict[str, list[Batch]] = field(repr=False)  # What it was computed from, by contest

    def of_kind(self, kind: str) -> list[ContestSummary]:
        """Return the contests of one kind."""
        return [contest for contest in self.contests if contest.kind == kind]

    def contest(self, name: str) -> ContestSummary | None:
        """Return a contest by its name."""
        return next((contest for contest in self.contests if contest.name == name), None)

    @property
    def flags(self) -> list[str]:
        """What holds for the run as a whole."""
        speeds = [row.speed for contest in self.contests for row in contest.rows if row.speed]
        busy = [speed.foreign_cpus for speed in speeds if speed.foreign_cpus > FOREIGN_CPUS]
        unfinished = sum("not finished" in contest.note for contest in self.contests)
        many = (
            f"In {len(busy)} of {len(speeds)} rows something else kept more than {FOREIGN_CPUS} CPUs busy (median of "
            f"the slices; {max(busy, default=0):.1f} at worst). Ratios come from neighbouring slices and suffer less."
        )
        lack = f"The run is not finished: {unfinished} of {len(self.contests)} contests lack restarts."
        return [*([many] if busy else []), *([lack] if unfinished else [])]


def summarise(directory: Path) -> Summary:
    """Read a result directory.

    Raises:
        NoRunError: There is no run in it.
    """
    facts = RunFacts.read(directory)
    by_contest: defaultdict[str, list[Batch]] = defaultdict(list)
    for batch in results.read_batches(directory):
        by_contest[batch.contest].append(batch)
    own = {name: _floors([batches]) for name, batches in by_contest.items()}
    usual = {metric: middle_of(floors.get(metric) for floors in own.values()) or 1.0 for metric in METRICS}
    # One pair of identical arms can be alike by luck: no contest is taken to be calmer than half of them are.
    floors = {name: {one: max(floor, usual[one]) for one, floor in own[name].items()} for name in own}
    wanted = int(facts.options.get("matrix", {}).get("restarts", 0))
    contests = [_contest(name, batches, floors[name], wanted) for name, batches in by_contest.items()]
    by_sweep: defaultdict[tuple[str, Arm], list[SweepStep]] = defaultdict(list)
    for step in results.read_sweep(directory):
        by_sweep[step.workload, step.arm].append(step)
    sweeps = [SweepSummary(arm, workload, steps) for (workload, arm), steps in by_sweep.items()]
    standings = list(_standings(contests, by_contest))
    return Summary(facts, contests, standings, sweeps, by_contest)


def _broken(batches: Sequence[Batch]) -> set[str]:
    return {cell.arm.name for batch in batches for cell in batch.cells if cell.broken}


def _contest(name: str, batches: Sequence[Batch], floors: dict[str, float], wanted: int) -> ContestSummary:
    kind, *middle = name.split("/")
    reference, broken = batches[0].reference, _broken(batches)
    cells, rows, notes = [cell for batch in batches for cell in batch.cells], list[Row](), list[str]()
    for arm in dict.fromkeys(cell.arm for cell in cells):
        found = [cell for cell in cells if cell.arm == arm]
        slices = [one for batch in batches for one in batch.slices if one.arm == arm.name]
        compared = not broken & {arm.name, reference} and arm.name != reference
        ratios = _ratios([batches], arm.name, floors) if compared else {}
        # Broken arms look fast: what they did is nowhere from here on.
        speed = _speed(found, slices) if slices and arm.name not in broken else None
        rows.append(Row(arm, arm.name == reference, found, speed, ratios))
    rows.sort(key=lambda row: (not row.reference, not row.arm.copy))
    if reference in broken:
        notes.append("The reference is broken, so there is nothing to divide by.")
    elif not floors and any(row.speed for row in rows):
        notes.append("No A/A arm was measured, so no difference is claimed.")
    if len(batches) < wanted:
        notes.append(f"The run is not finished: {len(batches)} of {wanted} restarts.")
    rounds = sum(len({one.round for one in batch.slices}) for batch in batches)
    pool = middle[0] if kind != "pools" else ""
    return ContestSummary(name, kind, pool, batches[0].workload, rows, len(batches), rounds, floors, " ".join(notes))


def _groups(contests: Iterable[Sequence[Batch]], arm: str, metric: str) -> Groups:
    """Return the ratios of an arm to the reference, worker by worker, of one contest or of several."""
    return [one for found in contests for one in paired_ratios(found, arm, found[0].reference, METRICS[metric])]


def _ratios(contests: Sequence[Sequence[Batch]], arm: str, floors: Mapping[str, float]) -> dict[str, Ratio]:
    found = {name: _groups(contests, arm, name) for name in METRICS}
    return {name: judged(estimate(one), METRICS[name], floors.get(name)) for name, one in found.items() if one}


def _floors(contests: Sequence[Sequence[Batch]]) -> dict[str, float]:
    """Return what arms that do as the reference does show: its copy, and what `auto` chose asked for by name."""
    again: dict[str, list[Sequence[Batch]]] = {}
    for batches in contests:
        cells = {cell.arm.name: cell for batch in reversed(batches) for cell in batch.cells}
        reference = batches[0].reference
        alike = {
            name: (cell.arm.pool, cell.arm.concurrency, cell.arm.pattern, cell.strategy) for name, cell in cells.items()
        }
        for name in cells:
            if name != reference and alike[name] == alike.get(reference) and not _broken(batches) & {name, reference}:
                again.setdefault(name, []).append(batches)
    floors = {metric: noise_floor(_groups(found, name, metric) for name, found in again.items()) for metric in METRICS}
    return {name: floor for name, floor in floors.items() if floor is not None}


def _standings(contests: Sequence[ContestSummary], batches: Mapping[str, Sequence[Batch]]) -> Iterator[Standing]:
    """Yield every pattern under every worker pool: all workers of all its contests, where it is right."""
    for pool in dict.fromkeys(contest.pool for contest in contests if contest.kind == "patterns"):
        own = [contest for contest in contests if contest.kind == "patterns" and contest.pool == pool]
        floors = _floors([batches[contest.name] for contest in own])
        for arm in dict.fromkeys(row.arm for contest in own for row in contest.rows if not row.arm.copy):
            rows = [(contest, row) for contest in own if (row := contest.row(arm.name))]
            right = [batches[contest.name] for contest, row in rows if row.ratios]
            broken, blocked = (sum(getattr(row, what) for _, row in rows) for what in ("broken", "blocked"))
            yield Standing(pool, arm, len(rows), broken - blocked, blocked, _ratios(right, arm.name, floors))


def first_breaches(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return the first of each invariant that did not hold."""
    found: dict[str, Verdict] = {}
    for verdict in verdicts:
        if not verdict.passed:
            found.setdefault(verdict.name, verdict)
    return list(found.values())


def _speed(cells: Sequence[Cell], slices: Sequence[Slice]) -> Speed:
    names = dict.fromkeys(name for cell in cells for name in cell.phases)
    phases = {name: Percentiles.middle([cell.phases[name] for cell in cells if name in cell.phases]) for name in names}
    latency = phases.pop("latency", None) or Percentiles.middle([one.latency for one in slices if one.latency])
    worker, database = (middle_of(METRICS[name].value(one) for one in slices) for name in ("cpu", "database_cpu"))
    known = {name: one for name, one in phases.items() if one}
    return Speed(
        goodput_per_s=statistics.median(one.goodput_per_s for one in slices),
        worker_cpu_ms=None if worker is None else worker * 1000,
        database_cpu_ms=None if database is None else database * 1000,
        latency=latency,
        phases=known,
        foreign_cpus=statistics.median(one.foreign_cpus for one in slices),
        flags=list(_flags(slices, latency, known)),
    )


def _flags(slices: Sequence[Slice], latency: Percentiles | None, phases: Mapping[str, Percentiles]) -> Iterator[str]:
    foreign = statistics.median(one.foreign_cpus for one in slices)
    share = statistics.median(one.generator_cpu_s / one.wall_s if one.wall_s else 0.0 for one in slices)
    lag = statistics.median(one.send_lag_p99_ms for one in slices)
    if foreign > FOREIGN_CPUS:
        yield f"foreign CPU: something else kept {foreign:.1f} CPUs busy"
    if share > GENERATOR_SHARE:
        yield f"generator-bound: the load generator used {share:.0%} of a CPU"
    elif latency and latency.p50 and lag > SEND_LAG * latency.p50:
        yield f"generator-bound: sends were up to {lag:.1f} ms late (p99)"
    checkout, run = phases.get("checkout"), phases.get("run")
    if checkout and run and checkout.p95 > CHECKOUT_SHARE * run.p95:
        yield (
            f"connection pool: tasks wait {checkout.p95:.1f} ms for a connection (p95, of a run of {run.p95:.1f} ms): "
            f"a larger connection pool may help"
        )
