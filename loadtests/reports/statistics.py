"""What may be said about a difference: workers are what is drawn again, then their rounds; and the A/A floor.

Two workers that run the same code differ for as long as they live, so many rounds of few workers prove little. The unit
of resampling is the worker (one restart of one arm); within each worker drawn, its rounds are drawn again.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..bench.results import Batch, Slice

TAIL = 0.025  # What a 95 % interval leaves out on each side
ENOUGH = 6  # With fewer workers not even the interval from the least to the most covers the middle in 95 of 100 runs
DRAWS, DRAWS_OF_ROUNDS, SEED = 2000, 100, 20261126
LARGEST = 1000.0
"""A ratio beyond this factor counts as this: a slice without one success is in the middle, and not infinite."""
BETTER = {"faster", "cheaper"}
NO_DIFFERENCE = "no difference shown"

Groups = Sequence[Sequence[float]]  # Values of the rounds, worker by worker; none of them empty


@dataclass(frozen=True, slots=True)
class Estimate:
    """The middle of the workers, and the interval that covers the true one in 95 of 100 runs."""

    workers: int
    rounds: int  # Of all workers
    middle: float  # The geometric mean of the workers, each by the median of its rounds
    low: float | None = None  # None where there are too few workers for an interval
    high: float | None = None

    @property
    def excludes_one(self) -> bool:
        """Whether there is an interval, and 1 is not in it."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


def estimate(*sides: Groups) -> Estimate:
    """Return the middle of positive values with its interval, by a hierarchical bootstrap.

    Args:
        sides: Ratios; or two sets of values that did not take turns: the first is divided by the second.
    Raises:
        ValueError: There are no values on one side.
    """
    if not all(sides):
        raise ValueError("there is no middle of no values")
    signs = (1, -1)[: len(sides)]
    # Of what is to be divided, a value of 0 counts as hardly anything.
    low, high = (1 / LARGEST, LARGEST) if len(sides) == 1 else (1e-9, math.inf)
    logs = [[np.log(np.clip(group, low, high)) for group in side] for side in sides]
    middle = sum(sign * np.mean([np.median(group) for group in side]) for sign, side in zip(signs, logs, strict=True))
    workers = min(len(side) for side in sides)
    rounds = min(sum(map(len, side)) for side in sides)
    if workers < ENOUGH:
        return Estimate(workers, rounds, math.exp(middle))
    rng = np.random.default_rng(SEED)
    drawn = sum(sign * _draw(side, rng) for sign, side in zip(signs, logs, strict=True))
    low, high = np.exp(middle + _widened(workers) * (np.quantile(drawn, [TAIL, 1 - TAIL]) - middle))
    return Estimate(workers, rounds, math.exp(middle), float(low), float(high))


def _draw(groups: Sequence[Any], rng: np.random.Generator) -> Any:
    """Return the means of as many workers as there are, drawn with replacement, each with its rounds drawn again.

    Workers differ by more than they are apart: by the noise of their rounds, which the second draw adds again. So they
    are first moved together by as much, or the interval would be up to half too wide.
    Source: A. C. Davison, D. V. Hinkley, "Bootstrap Methods and Their Application" (1997), section 3.8.
    """
    middles = np.array([np.median(group) for group in groups])
    noise = np.stack([np.median(rng.choice(one, (DRAWS_OF_ROUNDS, len(one))), axis=1) for one in groups])
    noise -= middles[:, None]  # workers x draws of their rounds
    apart = np.var(middles)
    shrink = math.sqrt(max(0.0, 1 - np.mean(noise**2) / apart)) if apart else 0.0
    moved = middles.mean() + shrink * (middles - middles.mean())
    workers = rng.integers(len(groups), size=(DRAWS, len(groups)))
    return (moved[workers] + noise[workers, rng.integers(DRAWS_OF_ROUNDS, size=workers.shape)]).mean(axis=1)


def _widened(workers: int) -> float:
    """Return by how much an interval of few workers must be wider: they vary less than what they stand for.

    It is Student's interval divided by the one that a bootstrap of a mean gives.
    """
    n, z = workers - 1, statistics.NormalDist().inv_cdf(1 - TAIL)
    # Student's t by its expansion around the normal distribution; within 0.01 from n = 5 on.
    t = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return t / z * math.sqrt(workers / n)


@dataclass(frozen=True, slots=True)
class Metric:
    """Something measured in a slice that two arms are compared by."""

    name: str
    label: str
    value: Callable[[Slice], float | None]  # None where a slice has no such value
    above: str  # What is said of an arm whose ratio to the reference is above 1
    below: str


def _per_task(name: str, one: Slice) -> float | None:
    spent: float | None = getattr(one, name)
    return None if spent is None or not one.tasks else spent / one.tasks


def _latency(name: str, one: Slice) -> float | None:
    return getattr(one.latency, name, None)


COST = ("dearer", "cheaper")
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("goodput", "goodput", lambda one: one.goodput_per_s, "faster", "slower"),
        Metric("cpu", "worker CPU per task", partial(_per_task, "worker_cpu_s"), *COST),
        Metric("database_cpu", "database CPU per task", partial(_per_task, "database_cpu_s"), "dearer", "cheaper"),
        *(
            Metric(name, f"{name} latency", partial(_latency, name), "slower", "faster")
            for name in ("p50", "p95", "p99")
        ),
    )
}
"""By name."""


def paired_ratios(batches: Iterable[Batch], arm: str, reference: str, metric: Metric) -> list[list[float]]:
    """Return arm divided by reference, round by round of each batch; rounds with a value of one only are left out."""
    found = []
    for batch in batches:
        rounds: defaultdict[int, dict[str, float | None]] = defaultdict(dict)
        for one in batch.slices:
            rounds[one.round][one.arm] = metric.value(one)
        pairs = [(values.get(arm), values.get(reference)) for values in rounds.values()]
        ratios = [a / b if b else math.inf for a, b in pairs if a is not None and b is not None and (a or b)]
        if ratios:
            found.append(ratios)
    return found


def distance(ratio: float) -> float:
    """Return how far a ratio is from 1, in either direction, as a factor of at least 1."""
    return math.inf if ratio <= 0 else max(ratio, 1 / ratio)


def noise_floor(copies: Iterable[Groups]) -> float | None:
    """Return the factor below which nothing is a difference: what arms that are the reference again show.

    It is the farthest that their intervals reach, or that one worker was off where there are too few for an interval;
    None if no such arm was measured.
    """
    reached: list[float] = []
    for groups in copies:
        if groups:
            found = estimate(groups)
            ends = [one for one in (found.low, found.high) if one is not None]
            reached += map(distance, ends or [estimate([group]).middle for group in groups])
    return max(reached, default=None)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How an arm compares with another by one metric, and what may be said about it."""

    metric: str
    estimate: Estimate
    verdict: str  # `faster`, `slower`, `cheaper`, `dearer` or `no difference shown`
    reason: str = ""  # Why no difference is shown; empty if one is
    floor: float | None = None  # The A/A floor that it was held against

    @property
    def better(self) -> bool:
        """Whether the arm is shown to be better."""
        return self.verdict in BETTER

    @property
    def worse(self) -> bool:
        """Whether the arm is shown to be worse."""
        return self.verdict not in {*BETTER, NO_DIFFERENCE}


def judged(found: Estimate, metric: Metric, floor: float | None) -> Ratio:
    """Return an estimate with its verdict, by the one rule: an interval without 1, and beyond the A/A floor.

    Args:
        floor: What `noise_floor` returned for this metric.
    """
    if found.low is None:
        reason = f"too few workers ({found.workers}) for a 95 % interval, which takes {ENOUGH}"
    elif not found.excludes_one:
        reason = "the interval holds 1"
    elif floor is None:
        reason = "no A/A arm shows the noise floor"
    # A hair more: 1 / (1 / x) is not always x.
    elif distance(found.middle) <= floor * (1 + 1e-9):
        reason = f"within the A/A floor of {(floor - 1) * 100:.1f} %"
    else:
        reason = ""
    verdict = metric.above if found.middle > 1 else metric.below
    return Ratio(metric.name, found, NO_DIFFERENCE if reason else verdict, reason, floor)


def middle_of(values: Iterable[float | None]) -> float | None:
    """Return the median of the values that are known; None of none."""
    known = [one for one in values if one is not None]
    return statistics.median(known) if known else None
