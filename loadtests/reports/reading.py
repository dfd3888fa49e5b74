"""Reads a result directory, and sums it up: what was measured of whom, and what may be said about it."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from ..bench.results import (
    Arm,
    Batch,
    Cell,
    Counted,
    RunFacts,
    Slice,
    SweepStep,
    Verdict,
    read_batches,
    read_round_trips,
    read_sweep,
)
from ..client.percentiles import Percentiles
from .statistics import METRICS, Groups, Ratio, compare_groups, middle_of, noise_floor, paired_ratios
from .summary import Breach, ContestSummary, Row, Speed, Standing, Summary, SweepSummary

FOREIGN_CPUS = 0.3  # More than this many CPUs busy with something else, and a row is marked
GENERATOR_SHARE = 0.8  # A load generator that is busier than this measures itself
SEND_LAG = 0.1  # So does one that sends later than it should by more than this share of the median latency
CHECKOUT_SHARE = 0.1
"""Tasks that wait longer than this share of their run for a connection may want a larger connection pool."""


def summarise(directory: Path) -> Summary:
    """Read a result directory.

    Raises:
        NoRunError: There is no run in it.
    """
    facts = RunFacts.read(directory)
    by_contest: defaultdict[str, list[Batch]] = defaultdict(list)
    for batch in read_batches(directory):
        by_contest[batch.contest].append(batch)
    own = {name: _floors([batches]) for name, batches in by_contest.items()}
    usual = {metric: middle_of(floors.get(metric) for floors in own.values()) or 1.0 for metric in METRICS}
    # One pair of identical arms can be alike by luck: no contest is taken to be calmer than half of them are.
    floors = {name: {one: max(floor, usual[one]) for one, floor in own[name].items()} for name in own}
    wanted = int(facts.options.get("matrix", {}).get("restarts", 0))
    contests = [_contest(name, batches, floors[name], wanted) for name, batches in by_contest.items()]
    by_sweep: defaultdict[tuple[str, Arm], list[SweepStep]] = defaultdict(list)
    for step in read_sweep(directory):
        by_sweep[step.workload, step.arm].append(step)
    sweeps = [_sweep(arm, workload, steps) for (workload, arm), steps in by_sweep.items()]
    standings = list(_standings(contests, by_contest))
    return Summary(facts, contests, standings, sweeps, read_round_trips(directory), _run_flags(contests))


def _broken(batches: Sequence[Batch]) -> set[str]:
    return {cell.arm.name for batch in batches for cell in batch.cells if cell.broken}


def _contest(name: str, batches: Sequence[Batch], floors: Mapping[str, float], wanted: int) -> ContestSummary:
    kind, *middle = name.split("/")
    reference, broken = batches[0].reference, _broken(batches)
    cells: dict[Arm, list[tuple[int, Cell]]] = {}
    slices: defaultdict[str, list[Slice]] = defaultdict(list)
    for batch in batches:
        for cell in batch.cells:
            cells.setdefault(cell.arm, []).append((batch.number, cell))
        for one in batch.slices:
            # Broken arms look fast: what they did is nowhere from here on.
            if one.arm not in broken:
                slices[one.arm].append(one)
    rows = []
    for arm, found in cells.items():
        compared = not broken & {arm.name, reference} and arm.name != reference
        ratios = _ratios([batches], arm.name, floors) if compared else {}
        rows.append(_row(arm, found, slices[arm.name], ratios, arm.name == reference))
    rows.sort(key=lambda row: (not row.reference, not row.arm.copy))
    notes = []
    if reference in broken:
        notes.append("The reference is broken, so there is nothing to divide by.")
    elif not floors and any(slices.values()):
        notes.append("No A/A arm was measured, so no difference is claimed.")
    if len(batches) < wanted:
        notes.append(f"The run is not finished: {len(batches)} of {wanted} restarts.")
    rounds = sum(len({one.round for one in batch.slices}) for batch in batches)
    pool = middle[0] if kind != "pools" else ""
    return ContestSummary(
        name, kind, pool, batches[0].workload, rows, len(batches), rounds, dict(floors), " ".join(notes)
    )


def _groups(contests: Iterable[Sequence[Batch]], arm: str, metric: str) -> list[list[float]]:
    """Return the ratios of an arm to the reference, worker by worker, of one contest or of several."""
    return [
        ratios
        for batches in contests
        for ratios in paired_ratios(batches, arm, batches[0].reference, METRICS[metric])
    ]  # fmt: skip


def _ratios(contests: Sequence[Sequence[Batch]], arm: str, floors: Mapping[str, float]) -> dict[str, Ratio]:
    found = {
        name: compare_groups(_groups(contests, arm, name), metric, floors.get(name)) for name, metric in METRICS.items()
    }
    return {name: ratio for name, ratio in found.items() if ratio}


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
            right = [batches[contest.name] for contest, row in rows if row.speed and not row.reference]
            right = [one for one in right if one[0].reference not in _broken(one)]
            broken, blocked = (sum(getattr(row, what) for _, row in rows) for what in ("broken", "blocked"))
            ratios = _ratios(right, arm.name, floors) if right else {}
            yield Standing(pool, arm, len(rows), broken - blocked, blocked, ratios)


def _row(
    arm: Arm, found: Sequence[tuple[int, Cell]], slices: Sequence[Slice], ratios: dict[str, Ratio], reference: bool
) -> Row:
    cells = [cell for _, cell in found]
    verdicts = [verdict for cell in cells for verdict in cell.verdicts]
    breaches = _breaches((number, verdict) for number, cell in found for verdict in cell.verdicts)
    promised = [cell.promised_connections for cell in cells if cell.promised_connections is not None]
    speed = _speed(cells, slices, ratios) if slices and not breaches else None
    errors: Counter[str] = Counter()
    for cell in cells:
        errors.update(cell.errors)
    return Row(
        arm,
        reference,
        breaches,
        speed,
        unchecked=list(dict.fromkeys(f"{one.name}: {one.detail}" for one in verdicts if one.passed and one.detail)),
        strategy=cells[0].strategy,
        peak_connections=max(cell.peak_connections for cell in cells),
        promised_connections=max(promised, default=None),
        # Measured in the first batch only.
        pss_bytes=max(cell.pss_bytes for cell in cells),
        tasks=sum(cell.tasks for cell in cells),
        errors=dict(errors.most_common()),
        flags=_flags(speed) if speed else [],
        log=next((cell.log for cell in cells if cell.broken and cell.log), ""),
        counted=_counted([cell.counted for cell in cells if cell.counted]),
    )


def _counted(found: Sequence[Counted]) -> Counted | None:
    return Counted(*(sum(getattr(one, part.name) for one in found) for part in fields(Counted))) if found else None


def _breaches(verdicts: Iterable[tuple[int, Verdict]]) -> list[Breach]:
    broken: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for number, verdict in verdicts:
        if not verdict.passed:
            broken[verdict.name].append((number, verdict.detail))
    return [Breach(name, found[0][1], tuple(number for number, _ in found)) for name, found in broken.items()]


def _speed(cells: Sequence[Cell], slices: Sequence[Slice], ratios: dict[str, Ratio]) -> Speed:
    names = dict.fromkeys(name for cell in cells for name in cell.phases)
    phases = {name: _middle([cell.phases[name] for cell in cells if name in cell.phases]) for name in names}
    latency = phases.pop("latency", None) or _middle([one.latency for one in slices if one.latency])
    worker, database = (middle_of(METRICS[name].value(one) for one in slices) for name in ("cpu", "database_cpu"))
    return Speed(
        goodput_per_s=statistics.median(one.goodput_per_s for one in slices),
        worker_cpu_ms=None if worker is None else worker * 1000,
        database_cpu_ms=None if database is None else database * 1000,
        latency=latency,
        phases={name: one for name, one in phases.items() if one},
        ratios=ratios,
        generator_share=statistics.median(one.generator_cpu_s / one.wall_s if one.wall_s else 0.0 for one in slices),
        foreign_cpus=statistics.median(one.foreign_cpus for one in slices),
        send_lag_p99_ms=statistics.median(one.send_lag_p99_ms for one in slices),
    )


def _middle(found: Sequence[Percentiles]) -> Percentiles | None:
    """Return the median of each percentile: raw values of several workers are not one distribution."""
    if not found:
        return None
    p50, p95, p99 = (round(statistics.median(getattr(one, name) for one in found), 2) for name in ("p50", "p95", "p99"))
    p999 = middle_of(one.p999 for one in found)
    return Percentiles(sum(one.n for one in found), p50, p95, p99, max(one.max for one in found), p999)


def middle_of_steps(steps: Iterable[SweepStep | None], which: str) -> Percentiles | None:
    """Return the median of each percentile of the steps of several sweeps; `which` is `latency` or `uncorrected`."""
    return _middle([found for step in steps if step and (found := getattr(step, which))])


def _flags(speed: Speed) -> list[str]:
    flags = []
    if speed.foreign_cpus > FOREIGN_CPUS:
        flags.append(f"foreign CPU: something else kept {speed.foreign_cpus:.1f} CPUs busy")
    if speed.generator_share > GENERATOR_SHARE:
        flags.append(f"generator-bound: the load generator used {speed.generator_share:.0%} of a CPU")
    elif speed.latency and speed.latency.p50 and speed.send_lag_p99_ms > SEND_LAG * speed.latency.p50:
        flags.append(f"generator-bound: sends were up to {speed.send_lag_p99_ms:.1f} ms late (p99)")
    checkout, run = speed.phases.get("checkout"), speed.phases.get("run")
    if checkout and run and checkout.p95 > CHECKOUT_SHARE * run.p95:
        flags.append(
            f"connection pool: tasks wait {checkout.p95:.1f} ms for a connection (p95, of a run of {run.p95:.1f} ms): "
            f"a larger connection pool may help"
        )
    return flags


def _sweep(arm: Arm, workload: str, steps: Sequence[SweepStep]) -> SweepSummary:
    breaches = _breaches((step.sweep, verdict) for step in steps for verdict in step.verdicts)
    measured = sorted((one for one in steps if one.offered_per_s), key=lambda one: (one.sweep, one.offered_per_s))
    found = SweepSummary(arm, workload, [] if breaches else measured, breaches, [])
    if not found.steps:
        return found
    flags = []
    if (foreign := statistics.median(step.foreign_cpus for step in measured)) > FOREIGN_CPUS:
        flags.append(f"foreign CPU: something else kept {foreign:.1f} CPUs busy")
    lags = [step.send_lag_p99_ms for step in found.kept if step and step.latency
            and step.send_lag_p99_ms > max(SEND_LAG * step.latency.p50, 1.0)]  # fmt: skip
    if lags:
        flags.append(f"generator-bound: sends were up to {max(lags):.1f} ms late (p99)")
    return replace(found, flags=flags)


def _run_flags(contests: Sequence[ContestSummary]) -> list[str]:
    speeds = [row.speed for contest in contests for row in contest.rows if row.speed]
    busy = [speed.foreign_cpus for speed in speeds if speed.foreign_cpus > FOREIGN_CPUS]
    flags = []
    if busy:
        flags.append(
            f"In {len(busy)} of {len(speeds)} rows something else kept more than {FOREIGN_CPUS} CPUs busy (median of "
            f"the slices; {max(busy):.1f} at worst). Ratios come from neighbouring slices and suffer less than rates."
        )
    if unfinished := [contest.name for contest in contests if "not finished" in contest.note]:
        flags.append(f"The run is not finished: {len(unfinished)} of {len(contests)} contests lack restarts.")
    return flags


def worker_values(batches: Iterable[Batch], arm: str, metric: str) -> Groups:
    """Return what was measured of an arm, worker by worker."""
    found = ([METRICS[metric].value(one) for one in batch.slices if one.arm == arm] for batch in batches)
    return [known for values in found if (known := [one for one in values if one is not None])]
