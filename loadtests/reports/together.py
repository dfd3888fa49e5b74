"""All workloads of a worker pool together: what a pattern gains or costs there.

One contest has few rounds, and its interval is wide. Here the values are the medians of batches: every batch has
workers of its own, started anew, so they are independent of each other as rounds of one batch are not, and there are as
many as workloads times restarts. Workloads count alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..patterns import OURS
from .statistics import ENOUGH, METRICS, NO_DIFFERENCE, Estimate, Metric, distance, paired_ratios, ratio_interval
from .summary import ContestSummary, Summary

SHOWN = ("goodput", "cpu")
"""The metrics it is told for."""


@dataclass(frozen=True, slots=True)
class PoolRatio:
    """How an arm compares with the reference by one metric, over all workloads of one worker pool."""

    metric: str
    estimate: Estimate
    """Its n are batches."""
    workloads: int
    """In how many it is right, and was measured."""
    verdict: str
    """`faster`, `slower`, `cheaper`, `dearer` or `no difference shown`."""
    reason: str
    """Why no difference is shown; empty if one is."""
    floor: float | None
    """How far the interval of the reference's own copies reaches from 1, as a factor."""

    @property
    def shown(self) -> bool:
        """Whether there is a difference that may be claimed."""
        return self.verdict != NO_DIFFERENCE


@dataclass(frozen=True, slots=True)
class PoolStanding:
    """One pattern under one worker pool."""

    pool: str
    label: str
    pattern: str
    ratios: dict[str, PoolRatio]
    """By metric; without those of which there is not one ratio."""


def pool_standings(summary: Summary) -> list[PoolStanding]:
    """Return each pattern under each worker pool, against the reference there; ours first."""
    found: list[PoolStanding] = []
    contests = [
        one for one in summary.contests if one.kind == "patterns" and one.reference and not one.reference.broken
    ]
    for pool in dict.fromkeys(one.pool for one in contests):
        own = [one for one in contests if one.pool == pool]
        floors = {name: _floor(_medians(own, _copies(own), METRICS[name])) for name in SHOWN}
        arms = {row.arm.label: row.arm for one in own for row in one.rows if not row.reference and not row.arm.copy}
        for label, arm in sorted(arms.items(), key=lambda item: item[1].pattern != OURS):
            ratios = {name: _ratio(own, label, METRICS[name], floors[name]) for name in SHOWN}
            known = {name: ratio for name, ratio in ratios.items() if ratio}
            if known:
                found.append(PoolStanding(pool, label, arm.pattern, known))
    return found


def labels_of(standings: Sequence[PoolStanding]) -> list[str]:
    """Return the labels of all worker pools, each once, ours first."""
    return list(dict.fromkeys(one.label for one in sorted(standings, key=lambda one: one.pattern != OURS)))


def _copies(contests: Sequence[ContestSummary]) -> set[str]:
    return {row.arm.label for one in contests for row in one.rows if row.arm.copy}


def _medians(contests: Sequence[ContestSummary], labels: Iterable[str], metric: Metric) -> list[float]:
    """Return the median ratio to the reference of every batch of these contests."""
    wanted = set(labels)
    medians: list[float] = []
    for contest in contests:
        assert contest.reference is not None
        for row in contest.rows:
            if row.arm.label in wanted and row.speed:
                pairs = paired_ratios(contest.pairs, row.name, contest.reference.name, metric)
                medians += [ratio_interval(ratios).median for ratios in pairs.by_batch.values()]
    return medians


def _floor(medians: Sequence[float]) -> float | None:
    if not medians:
        return None
    estimate = ratio_interval(medians)
    ends = (estimate.low, estimate.high)
    return max(distance(end) for end in (*ends, estimate.median) if end is not None)


def _ratio(contests: Sequence[ContestSummary], label: str, metric: Metric, floor: float | None) -> PoolRatio | None:
    medians = _medians(contests, [label], metric)
    if not medians:
        return None
    estimate = ratio_interval(medians)
    reason = _doubt(estimate, floor)
    word = NO_DIFFERENCE if reason else metric.word(estimate.median)
    workloads = sum(any(row.arm.label == label and row.speed for row in one.rows) for one in contests)
    return PoolRatio(metric.name, estimate, workloads, word, reason, floor)


def _doubt(estimate: Estimate, floor: float | None) -> str:
    if estimate.low is None:
        return f"{estimate.n} batches are too few for a 95 % interval, which takes {ENOUGH}"
    if not estimate.excludes_one:
        return "the interval holds 1"
    if floor is None:
        return "no A/A arm shows the noise floor"
    if distance(estimate.median) <= floor * (1 + 1e-9):
        return f"within the A/A floor of {(floor - 1) * 100:.1f} %"
    return ""
