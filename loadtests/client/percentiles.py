"""Percentiles from raw values, and finer buckets for what Locust computes itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

PERCENTS = (50, 95, 99)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of sorted values; NaN of nothing."""
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def summary(values: Sequence[float]) -> dict[str, float] | None:
    """Return n, p50, p95, p99 and max of raw milliseconds, rounded to 0.01 ms; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return {
        "n": len(ordered),
        **{f"p{percent}": round(percentile(ordered, percent), 2) for percent in PERCENTS},
        "max": round(ordered[-1], 2),
    }


def bucket(response_time: float) -> float:
    """Return the milliseconds to 3 significant digits, but not finer than 0.01 ms.

    Locust's own buckets are 1 ms wide below 100 ms: 2.4 and 2.5 ms, 5 % apart, would be shown as 2 and 3.
    """
    if response_time < 1:
        return round(response_time, 2)
    return round(response_time, 2 - math.floor(math.log10(response_time)))


def install_buckets() -> None:
    """Make Locust compute its percentiles in these buckets; in distributed runs on the master and on each worker."""
    from locust import stats

    replaced: Any = stats
    replaced.bucket_response_time = bucket
