"""Reads a result directory, and sums it up: what was measured of whom, and what may be said about it."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..bench.results import (
    ROUND_TRIPS_FILE,
    Arm,
    Batch,
    Cell,
    RunFacts,
    Slice,
    SweepStep,
    Verdict,
    knee_of,
    read_batches,
    read_sweep,
)
from ..percentiles import Percentiles
from .statistics import METRICS, Ratio, compare_pairs, median_interval, noise_floor, paired_ratios
from .summary import Breach, ContestSummary, Row, Speed, Summary, SweepSummary

SUMMARY_FILE = "summary.json"
FOREIGN_CPUS = 0.3
"""More than this many CPUs busy with something else, and a row is marked."""
GENERATOR_SHARE = 0.8
"""A load generator that is busier than this measures itself."""
SEND_LAG = 0.1
"""So does one that sends later than it should by more than this share of the median latency."""


def summarise(directory: Path) -> Summary:
    """Read a result directory.

    Raises:
        FileNotFoundError: There is no `run.json` in it.
    """
    facts = RunFacts.read(directory)
    by_contest: defaultdict[str, list[Batch]] = defaultdict(list)
    for batch in read_batches(directory):
        by_contest[batch.contest].append(batch)
    wanted = int(_option(facts.options, "restarts") or 0)
    own = {name: _floors(batches) for name, batches in by_contest.items()}
    usual = {
        metric: statistics.median(floors[metric] for floors in own.values() if metric in floors)
        for metric in METRICS
        if any(metric in floors for floors in own.values())
    }
    # One pair of identical arms can be alike by luck: no contest is taken to be calmer than half of them are.
    floors = {name: {metric: max(floor, usual[metric]) for metric, floor in own[name].items()} for name in own}
    contests = [_contest(name, batches, floors[name], wanted) for name, batches in by_contest.items()]
    by_sweep: defaultdict[tuple[str, Arm], list[SweepStep]] = defaultdict(list)
    for step in read_sweep(directory):
        by_sweep[step.workload, step.arm].append(step)
    sweeps = [_sweep(arm, workload, steps) for (workload, arm), steps in by_sweep.items()]
    path = directory / ROUND_TRIPS_FILE
    trips = json.loads(path.read_text()) if path.exists() else {}
    return Summary(facts, contests, sweeps, trips, _run_flags(facts, contests))


def write_json(directory: Path, summary: Summary) -> Path:
    """Write `summary.json`, without the slices, and return its path."""
    content = asdict(summary)
    for contest in content["contests"]:
        del contest["pairs"]
    for rows in (*(contest["rows"] for contest in content["contests"]), content["sweeps"]):
        for row in rows:
            row["arm"] = {**row["arm"], "name": Arm(**row["arm"]).name}
    path = directory / SUMMARY_FILE
    path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")
    return path


def _finite(value: Any) -> Any:
    """JSON knows no infinity: a ratio to nothing is null there."""
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def _option(options: Mapping[str, Any], name: str) -> Any:
    """Return an option of the matrix, wherever the run keeps it."""
    part = options.get("matrix")
    return part.get(name) if isinstance(part, dict) else options.get(name)


def _contest(name: str, batches: Sequence[Batch], floors: dict[str, float], wanted: int) -> ContestSummary:
    kind, *middle = name.split("/")
    first = batches[0]
    reference = first.reference
    cells, broken = _cells(batches), _broken(batches)
    # Broken arms look fast: what they did is nowhere from here on.
    right = [
        Batch(**{**_shallow(batch), "slices": [one for one in batch.slices if one.arm not in broken]})
        for batch in batches
    ]
    slices: defaultdict[str, list[Slice]] = defaultdict(list)
    for batch in right:
        for one in batch.slices:
            slices[one.arm].append(one)
    rows = [
        _row(arm, found, slices[arm.name], _ratios(right, arm.name, reference, floors), arm.name == reference)
        for arm, found in cells.items()
    ]
    rows.sort(key=lambda row: (not row.reference, not row.arm.copy))
    notes = []
    if reference in broken:
        notes.append("The reference is broken, so there is nothing to divide by.")
    elif not floors and any(slices.values()):
        notes.append("No A/A arm was measured, so no difference is claimed.")
    if wanted and len(batches) < wanted:
        notes.append(f"The run is not finished: {len(batches)} of {wanted} batches.")
    rounds = sum(len({one.round for one in batch.slices}) for batch in batches)
    pool = middle[0] if kind == "patterns" and len(middle) > 1 else ""
    return ContestSummary(
        name, kind, pool, first.workload, rows, len(batches), rounds, floors, " ".join(notes), right
    )  # fmt: skip


def _cells(batches: Sequence[Batch]) -> dict[Arm, list[tuple[int, Cell]]]:
    """Return the cells of each arm, with the number of their batch."""
    found: dict[Arm, list[tuple[int, Cell]]] = {}
    for batch in batches:
        for cell in batch.cells:
            found.setdefault(cell.arm, []).append((batch.number, cell))
    return found


def _broken(batches: Sequence[Batch]) -> set[str]:
    return {cell.arm.name for batch in batches for cell in batch.cells if cell.broken}


def _shallow(batch: Batch) -> dict[str, Any]:
    return {name: getattr(batch, name) for name in Batch.__dataclass_fields__}


def _floors(batches: Sequence[Batch]) -> dict[str, float]:
    """Return what arms that do as the reference does show: its copy, and what `auto` chose asked for by name."""
    cells, broken, reference = _cells(batches), _broken(batches), batches[0].reference
    in_force = {arm: found[0][1].strategy for arm, found in cells.items()}
    own = next((arm for arm in cells if arm.name == reference), None)
    if own is None or reference in broken:
        return {}

    def same(arm: Arm) -> bool:
        alike = (arm.pool, arm.concurrency, arm.pattern) == (own.pool, own.concurrency, own.pattern)
        return alike and arm != own and in_force[arm] == in_force[own] and arm.name not in broken

    again = [arm.name for arm in cells if same(arm)]
    found = {
        metric.name: noise_floor(paired_ratios(batches, name, reference, metric) for name in again)
        for metric in METRICS.values()
    }
    return {name: floor for name, floor in found.items() if floor is not None}


def _ratios(batches: Sequence[Batch], arm: str, reference: str, floors: Mapping[str, float]) -> dict[str, Ratio]:
    if arm == reference:
        return {}
    compared = {
        name: compare_pairs(paired_ratios(batches, arm, reference, metric), metric, floors.get(name))
        for name, metric in METRICS.items()
    }
    return {name: ratio for name, ratio in compared.items() if ratio}


def _row(
    arm: Arm, found: Sequence[tuple[int, Cell]], slices: Sequence[Slice], ratios: dict[str, Ratio], reference: bool
) -> Row:
    cells = [cell for _, cell in found]
    breaches = _breaches([(number, verdict) for number, cell in found for verdict in cell.verdicts])
    speed = _speed(cells, slices, ratios) if slices and not breaches else None
    promised = [cell.promised_connections for cell in cells if cell.promised_connections is not None]
    errors: Counter[str] = Counter()
    for cell in cells:
        errors.update(cell.errors)
    return Row(
        arm=arm,
        reference=reference,
        breaches=breaches,
        unchecked=list(
            dict.fromkeys(
                f"{verdict.name}: {verdict.detail}"
                for cell in cells
                for verdict in cell.verdicts
                if verdict.passed and verdict.detail
            )
        ),
        strategy=cells[0].strategy,
        reason=cells[0].reason,
        speed=speed,
        peak_connections=max(cell.peak_connections for cell in cells),
        promised_connections=max(promised, default=None),
        # Measured in the first batch only.
        pss_bytes=max(cell.pss_bytes for cell in cells),
        start_s=statistics.median(cell.start_s for cell in cells),
        tasks=sum(cell.tasks for cell in cells),
        errors=dict(errors.most_common()),
        flags=_flags(speed) if speed else [],
        log=next((cell.log for cell in cells if cell.broken and cell.log), ""),
    )


def _breaches(verdicts: Iterable[tuple[int, Verdict]]) -> list[Breach]:
    broken: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for number, verdict in verdicts:
        if not verdict.passed:
            broken[verdict.name].append((number, verdict.detail))
    return [Breach(name, found[0][1], tuple(number for number, _ in found)) for name, found in broken.items()]


def _speed(cells: Sequence[Cell], slices: Sequence[Slice], ratios: dict[str, Ratio]) -> Speed:
    names = dict.fromkeys(name for cell in cells for name in cell.phases)
    phases = {name: _middle([cell.phases[name] for cell in cells if name in cell.phases]) for name in names}
    latency = phases.pop("latency", None)
    return Speed(
        goodput_per_s=median_interval(one.goodput_per_s for one in slices),
        worker_cpu_ms=_median_ms(METRICS["cpu"].value(one) for one in slices),
        database_cpu_ms=_median_ms(METRICS["database_cpu"].value(one) for one in slices),
        latency=latency or _latency(slices),
        phases=phases,
        ratios=ratios,
        generator_share=statistics.median(one.generator_cpu_s / one.wall_s if one.wall_s else 0.0 for one in slices),
        foreign_cpus=statistics.median(one.foreign_cpus for one in slices),
        send_lag_p99_ms=statistics.median(one.send_lag_p99_ms for one in slices),
    )


def _latency(slices: Sequence[Slice]) -> Percentiles | None:
    found = [one.latency for one in slices if one.latency]
    return _middle(found) if found else None


def _middle(found: Sequence[Percentiles]) -> Percentiles:
    """Return the median of each percentile: raw values of several workers are not one distribution."""
    p50, p95, p99 = (round(statistics.median(getattr(one, name) for one in found), 2) for name in ("p50", "p95", "p99"))
    return Percentiles(sum(one.n for one in found), p50, p95, p99, max(one.max for one in found))


def _median_ms(values: Iterable[float | None]) -> float | None:
    known = [value * 1000 for value in values if value is not None]
    return statistics.median(known) if known else None


def _flags(speed: Speed) -> list[str]:
    flags = []
    if speed.foreign_cpus > FOREIGN_CPUS:
        flags.append(f"foreign CPU: something else kept {speed.foreign_cpus:.1f} CPUs busy")
    if speed.generator_share > GENERATOR_SHARE:
        flags.append(f"generator-bound: the load generator used {speed.generator_share:.0%} of a CPU")
    elif speed.latency and speed.latency.p50 and speed.send_lag_p99_ms > SEND_LAG * speed.latency.p50:
        flags.append(f"generator-bound: sends were up to {speed.send_lag_p99_ms:.1f} ms late (p99)")
    return flags


def _sweep(arm: Arm, workload: str, steps: Sequence[SweepStep]) -> SweepSummary:
    breaches = _breaches([(0, verdict) for step in steps for verdict in step.verdicts])
    breaches = [Breach(breach.name, breach.detail, ()) for breach in breaches]
    measured = sorted((step for step in steps if step.offered_per_s > 0), key=lambda step: step.offered_per_s)
    if breaches or not measured:
        return SweepSummary(arm, workload, [], breaches, None, None, [])
    kept, knee = knee_of(measured)
    below = [step for step in measured if knee is None or step.offered_per_s < knee.offered_per_s]
    flags = []
    if (foreign := statistics.median(step.foreign_cpus for step in measured)) > FOREIGN_CPUS:
        flags.append(f"foreign CPU: something else kept {foreign:.1f} CPUs busy")
    late = [
        step
        for step in (below or measured[:1])
        if step.latency and step.send_lag_p99_ms > max(SEND_LAG * step.latency.p50, 1.0)
    ]
    if late:
        worst = max(step.send_lag_p99_ms for step in late)
        flags.append(f"generator-bound: sends were up to {worst:.1f} ms late (p99)")
    return SweepSummary(arm, workload, measured, [], kept, knee, flags)


def _run_flags(facts: RunFacts, contests: Sequence[ContestSummary]) -> list[str]:
    speeds = [row.speed for contest in contests for row in contest.rows if row.speed]
    flags = []
    busy = [speed.foreign_cpus for speed in speeds if speed.foreign_cpus > FOREIGN_CPUS]
    if busy:
        flags.append(
            f"In {len(busy)} of {len(speeds)} rows something else kept more than {FOREIGN_CPUS} CPUs busy (median of "
            f"the slices; {max(busy):.1f} at worst). Ratios come from neighbouring slices and suffer less than rates."
        )
    unfinished = [contest.name for contest in contests if "not finished" in contest.note]
    if unfinished:
        flags.append(f"The run is not finished: {len(unfinished)} of {len(contests)} contests lack batches.")
    if not facts.machine:
        flags.append("The machine is not known.")
    return flags
