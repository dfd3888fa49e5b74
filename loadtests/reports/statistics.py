"""What may be said about a difference: exact intervals, paired ratios, and the floor below which nothing is one."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from ..bench.results import Batch, Slice

CONFIDENCE = 0.95
ENOUGH = 6
"""With fewer values, not even the interval from the smallest to the largest covers the median in 95 of 100 runs."""

FASTER, SLOWER, CHEAPER, DEARER, NO_DIFFERENCE = "faster", "slower", "cheaper", "dearer", "no difference shown"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median, and the interval that covers it."""

    n: int
    median: float
    low: float | None = None
    """None where there are too few values for an interval of the wanted confidence."""
    high: float | None = None
    coverage: float | None = None
    """How often an interval made like this covers the true median, exactly: at least the wanted confidence."""

    @property
    def excludes_one(self) -> bool:
        """Whether there is an interval, and 1 is not in it."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


@cache
def interval_rank(n: int, confidence: float = CONFIDENCE) -> tuple[int, float] | None:
    """Return how many values the interval leaves out on each side, and its coverage; None if n is too small.

    It is the sign test's: from the k-th smallest of n values to the k-th largest. The true median is outside only if
    fewer than k of n fair coins show heads, or fewer than k show tails.
    """
    outside, found, tail = 0.0, None, 0
    for k in range(1, n // 2 + 1):
        tail += math.comb(n, k - 1)
        outside = 2 * tail / 2**n
        if outside > 1 - confidence:
            break
        found = (k - 1, 1 - outside)
    return found


def median_interval(values: Iterable[float], confidence: float = CONFIDENCE) -> Estimate:
    """Return the median of plain values with the exact interval of the sign test, which assumes no distribution.

    Raises:
        ValueError: There are no values.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("there is no median of no values")
    return _estimate(ordered, statistics.median(ordered), confidence)


def ratio_interval(ratios: Iterable[float], confidence: float = CONFIDENCE) -> Estimate:
    """Return the median of ratios with its interval: that of the reciprocals is the reciprocal.

    Raises:
        ValueError: There are no ratios.
    """
    ordered = sorted(ratios)
    if not ordered:
        raise ValueError("there is no median of no ratios")
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return _estimate(ordered, ordered[middle], confidence)
    # The geometric mean: the arithmetic one of 1/2 and 2 is 1.25, whichever is divided by whichever.
    low, high = ordered[middle - 1], ordered[middle]
    median = 1.0 if low == 0 and math.isinf(high) else low if low == high else math.sqrt(low) * math.sqrt(high)
    return _estimate(ordered, median, confidence)


def _estimate(ordered: Sequence[float], median: float, confidence: float) -> Estimate:
    n = len(ordered)
    if (rank := interval_rank(n, confidence)) is None:
        return Estimate(n, median)
    left_out, coverage = rank
    return Estimate(n, median, ordered[left_out], ordered[n - 1 - left_out], coverage)


@dataclass(frozen=True, slots=True)
class Metric:
    """Something measured in a slice that two arms are compared by."""

    name: str
    label: str
    value: Callable[[Slice], float | None]
    """None where a slice has no such value."""
    higher_is_better: bool
    better: str
    """What is said of an arm that is."""
    worse: str

    def word(self, ratio: float) -> str:
        """Return what is said of an arm with this ratio to the reference, which is not 1."""
        return self.better if (ratio > 1) == self.higher_is_better else self.worse


def _worker_cpu(one: Slice) -> float | None:
    return one.worker_cpu_s / one.tasks if one.tasks else None


def _database_cpu(one: Slice) -> float | None:
    return one.database_cpu_s / one.tasks if one.tasks and one.database_cpu_s is not None else None


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("goodput", "goodput", lambda one: one.goodput_per_s, True, FASTER, SLOWER),
        Metric("cpu", "worker CPU per task", _worker_cpu, False, CHEAPER, DEARER),
        Metric("database_cpu", "database CPU per task", _database_cpu, False, CHEAPER, DEARER),
        Metric("p50", "p50 latency", lambda one: one.latency.p50 if one.latency else None, False, FASTER, SLOWER),
        Metric("p95", "p95 latency", lambda one: one.latency.p95 if one.latency else None, False, FASTER, SLOWER),
        Metric("p99", "p99 latency", lambda one: one.latency.p99 if one.latency else None, False, FASTER, SLOWER),
    )
}
"""By name."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Ratios of one arm to another, each from two slices of the same round of the same batch."""

    by_batch: Mapping[int, Sequence[float]]
    left_out: int = 0
    """Rounds in which one of the two has no value, or both are 0: there is no ratio of nothing to nothing."""

    @property
    def pooled(self) -> list[float]:
        """The ratios of all batches."""
        return [ratio for ratios in self.by_batch.values() for ratio in ratios]


def paired_ratios(batches: Iterable[Batch], arm: str, reference: str, metric: Metric) -> Pairs:
    """Return arm divided by reference, round by round."""
    ratios: dict[int, list[float]] = {}
    left_out = 0
    for batch in batches:
        rounds: defaultdict[int, dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
        for one in sorted(batch.slices, key=lambda one: one.number):
            if one.arm in {arm, reference}:
                rounds[one.round][one.arm].append(metric.value(one))
        for values in rounds.values():
            pairs = list(zip(values[arm], values[reference], strict=False))
            left_out += max(len(values[arm]), len(values[reference])) - len(pairs)
            for above, below in pairs:
                if above is None or below is None or above == below == 0:
                    left_out += 1
                else:
                    ratios.setdefault(batch.number, []).append(above / below if below else math.inf)
    return Pairs(ratios, left_out)


def distance(ratio: float) -> float:
    """Return how far a ratio is from 1, in either direction, as a factor of at least 1."""
    return math.inf if ratio <= 0 else max(ratio, 1 / ratio)


def noise_floor(copies: Iterable[Pairs]) -> float | None:
    """Return the factor below which nothing is a difference: what arms that are the reference again show.

    It is the largest of what their intervals reach, and of their medians batch by batch: two workers that run the same
    code differ for as long as they live. None if no such arm was measured.
    """
    reached: list[float] = []
    for pairs in copies:
        if not (pooled := pairs.pooled):
            continue
        estimate = ratio_interval(pooled)
        ends = [estimate.low, estimate.high] if estimate.low is not None and estimate.high is not None else pooled
        medians = [ratio_interval(ratios).median for ratios in pairs.by_batch.values()]
        reached += [distance(ratio) for ratio in [*ends, *medians] if ratio is not None]
    return max(reached, default=None)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How an arm compares with another by one metric, and what may be said about it."""

    metric: str
    estimate: Estimate
    verdict: str
    """`faster`, `slower`, `cheaper`, `dearer` or `no difference shown`."""
    reason: str = ""
    """Why no difference is shown; empty if one is."""
    floor: float | None = None
    """The A/A floor that it was held against."""
    batches: dict[int, float] = field(default_factory=dict)
    """The median of each batch: workers are started anew between them."""
    left_out: int = 0
    """Rounds without a ratio."""

    @property
    def shown(self) -> bool:
        """Whether there is a difference that may be claimed."""
        return self.verdict != NO_DIFFERENCE


def compare_pairs(pairs: Pairs, metric: Metric, floor: float | None) -> Ratio | None:
    """Return the pooled ratio with what may be said about it; None if there is not one pair.

    Args:
        floor: What `noise_floor` returned for this metric.
    """
    if not (pooled := pairs.pooled):
        return None
    estimate = ratio_interval(pooled)
    batches = {number: ratio_interval(ratios).median for number, ratios in sorted(pairs.by_batch.items())}
    reason = _doubt(estimate, batches, floor)
    word = NO_DIFFERENCE if reason else metric.word(estimate.median)
    return Ratio(metric.name, estimate, word, reason, floor, batches, pairs.left_out)


def verdict(estimate: Estimate, batches: Mapping[int, float], floor: float | None, metric: Metric) -> str:
    """Return what may be said: one of the metric's two words, or that no difference is shown."""
    return NO_DIFFERENCE if _doubt(estimate, batches, floor) else metric.word(estimate.median)


def _doubt(estimate: Estimate, batches: Mapping[int, float], floor: float | None) -> str:
    """Return why a difference may not be claimed; empty if it may."""
    if estimate.low is None:
        return f"{estimate.n} rounds are too few for a 95 % interval, which takes {ENOUGH}"
    if not estimate.excludes_one:
        return "the interval holds 1"
    if floor is None:
        return "no A/A arm shows the noise floor"
    # A hair more: 1 / (1 / x) is not always x.
    if distance(estimate.median) <= floor * (1 + 1e-9):
        return f"within the A/A floor of {(floor - 1) * 100:.0f} %"
    if len(batches) < 2:
        return "seen in one batch only: it may be how these workers happened to start"
    same_side = [median for median in batches.values() if (median > 1) == (estimate.median > 1) and median != 1]
    if len(same_side) < len(batches):
        return f"the batches disagree: only in {len(same_side)} of {len(batches)} is it so"
    if sum(distance(median) > floor for median in same_side) < 2:
        return "beyond the A/A floor in one batch only"
    return ""
