"""Percentiles from raw values: exact, unlike Locust's, which come from rounded buckets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Self


def nearest_rank(ordered: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of sorted values do not exceed; NaN of nothing."""
    if not ordered:
        return math.nan
    # Rounded first: 0.07 * 100 is 7.000000000000001, which would be rank 8.
    rank = math.ceil(round(percent / 100 * len(ordered), 9))
    return ordered[max(rank, 1) - 1]


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Nearest-rank percentiles over raw values, in milliseconds, rounded to 0.01 ms."""

    n: int
    p50: float
    p95: float
    p99: float
    max: float
    p999: float | None = None
    """None in results that were kept before it was."""

    @classmethod
    def of(cls, values_ms: Iterable[float]) -> Self | None:
        """Return the percentiles of raw values; None of nothing."""
        ordered = sorted(values_ms)
        if not ordered:
            return None
        p50, p95, p99, p999 = (round(nearest_rank(ordered, percent), 2) for percent in (50, 95, 99, 99.9))
        return cls(len(ordered), p50, p95, p99, round(ordered[-1], 2), p999)

    @classmethod
    def middle(cls, found: Sequence[Self]) -> Self | None:
        """Return the median of each percentile: raw values of several workers are not one distribution."""
        if not found:
            return None
        p50, p95, p99 = (round(median(getattr(one, name) for one in found), 2) for name in ("p50", "p95", "p99"))
        p999 = [one.p999 for one in found if one.p999 is not None]
        most = max(one.max for one in found)
        return cls(sum(one.n for one in found), p50, p95, p99, most, median(p999) if p999 else None)
