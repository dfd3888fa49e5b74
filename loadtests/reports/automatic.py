"""Whether `auto` chooses the strategy that the evidence is for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..patterns import OURS
from .standings import is_better, is_worse, standing
from .statistics import CHEAPER, DEARER, FASTER, SLOWER
from .summary import ContestSummary, Row, Summary
from .together import PoolStanding
from .wording import count, evidence, factor, percent, together

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to set."""

    topic: str
    choice: str
    evidence: list[str]
    limits: list[str]
    """What would change it."""


@dataclass(frozen=True, slots=True)
class AutoCheck:
    """Whether `auto` chooses under one worker pool what the evidence says."""

    pool: str
    took: str
    agrees: bool | None
    """None if nothing was measured."""
    evidence: list[str]


def strategies_of(contest: ContestSummary) -> list[Row]:
    return [row for row in contest.rows if row.arm.pattern == OURS and not row.arm.copy and not row.reference]


def _superior(row: Row) -> bool:
    """Whether a strategy is better than `auto` in goodput or, at equal goodput, in CPU, and worse in neither."""
    goodput, cpu = row.ratio("goodput"), row.ratio("cpu")
    worse = is_worse(goodput) or is_worse(cpu)
    return not worse and (is_better(goodput) or is_better(cpu))


def strategy_advice(contest: ContestSummary, check: AutoCheck | None) -> Advice:
    reference = contest.reference
    took = reference.strategy if reference else ""
    if reference is None or reference.arm.pattern != OURS:
        return Advice("strategy", "no evidence", ["celery-alchemy is not the reference of this contest."], [])
    if reference.broken:
        breach = reference.breaches[0]
        return Advice("strategy", "no evidence", [f"auto took {took}, and is broken: {breach.name}: no."], [])
    lines = []
    for row in strategies_of(contest):
        if row.broken:
            lines.append(f"{row.arm.strategy} is broken: {row.breaches[0].name}: no.")
            continue
        goodput, cpu = row.ratio("goodput"), row.ratio("cpu")
        if goodput:
            lines.append(f"{row.arm.strategy} to auto: {evidence(goodput)}.")
        if cpu:
            lines.append(f"{row.arm.strategy} to auto: {evidence(cpu)}.")
    limits = list(reference.flags)
    if not lines:
        return Advice("strategy", f"auto ({took})", ["No other strategy was measured."], limits)
    better = [row for row in strategies_of(contest) if row.speed and _superior(row)]
    if better:
        best = max(better, key=standing)
        if check and check.agrees:
            limits.append("In the other workloads under this worker pool auto is not shown to be worse.")
        return Advice("strategy", best.arm.strategy, lines, limits)
    limits.append("No strategy is shown to be better, so auto is kept: it follows the worker pool when that changes.")
    return Advice("strategy", f"auto ({took})", lines, limits)


def auto_check(summary: Summary, pool: str, by_pool: Sequence[PoolStanding]) -> AutoCheck:
    contests = [found for found in summary.contests if found.kind == "patterns" and found.pool == pool]
    contests = [found for found in contests if (own := found.reference) and own.arm.strategy == AUTO]
    took = next((found.reference.strategy for found in contests if found.reference), "")
    broken = [
        f"{found.workload}: auto is broken: {found.reference.breaches[0].name}: no."
        for found in contests
        if found.reference and found.reference.broken
    ]
    if broken:
        return AutoCheck(pool, took, False, broken)
    lines, compared, better, worse = [], 0, 0, 0
    for contest in contests:
        for row in strategies_of(contest):
            if not row.speed:
                continue
            compared += 1
            told = [found for name in ("goodput", "cpu") if (found := row.ratio(name)) and found.shown]
            better += _superior(row)
            worse += any(is_worse(found) for found in told)
            lines += [f"{contest.workload}: {row.arm.strategy} to auto: {evidence(found)}." for found in told]
    if not compared:
        if took and any(found.reference and found.reference.speed for found in contests):
            return AutoCheck(pool, took, None, ["No other strategy was measured under this worker pool."])
        return AutoCheck(pool, took, None, ["Nothing was measured under this worker pool."])
    unmoved = compared - better - worse
    head = (
        f"{count(compared, 'comparison')} of another strategy with auto in {count(len(contests), 'workload')}: better "
        f"than auto in {better}, worse in {worse}"
        + (f", no difference shown in {unmoved}" if unmoved > 0 else "")
        + f"; goodput ratios from {_range(contests)}; A/A floor {_floor_range(contests, 'goodput')}."
    )
    over_all = [found for found in by_pool if found.pool == pool and found.pattern == OURS]
    lines += [f"Over all workloads, {found.label} to auto: {together(found)}." for found in over_all]
    agrees = better == 0 and not any(_superior_over_all(found) for found in over_all)
    return AutoCheck(pool, took, agrees, [head, *lines])


def _superior_over_all(found: PoolStanding) -> bool:
    words = {ratio.verdict for ratio in found.ratios.values()}
    return bool(words & {FASTER, CHEAPER}) and not words & {SLOWER, DEARER}


def _range(contests: Iterable[ContestSummary]) -> str:
    medians = [
        found.estimate.median for one in contests for row in strategies_of(one) if (found := row.ratio("goodput"))
    ]
    return f"{factor(min(medians))} to {factor(max(medians))}" if medians else "none"


def _floor_range(contests: Iterable[ContestSummary], metric: str) -> str:
    floors = [found.floors[metric] for found in contests if metric in found.floors]
    return f"{percent(min(floors))} to {percent(max(floors))}" if floors else "unknown"
