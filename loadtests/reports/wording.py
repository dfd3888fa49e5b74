"""How numbers are written, wherever they are shown."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..bench.results import Arm
from .statistics import Estimate


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with as many significant digits as it deserves; a dash for none."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def factor(value: float) -> str:
    """Return a ratio, such as `0.92`."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def interval(found: Estimate) -> str:
    """Return `0.92 [0.88, 0.97]`, or the middle alone where there are too few workers for an interval."""
    # An end that leaves out 1 by less than half a hundredth must not read as 1.
    ends = [f"{end:.3f}" if factor(end) == "1.00" else factor(end) for end in (found.low, found.high) if end]
    return f"{factor(found.middle)} [{', '.join(ends)}]" if ends else factor(found.middle)


def sizes(found: Estimate) -> str:
    """Return what an estimate rests on."""
    return f"n = {count(found.workers, 'worker')}, {count(found.rounds, 'round')}"


def percent(floor: float | None) -> str:
    """Return how far a factor is from 1, such as `±6.0 %`."""
    return "-" if floor is None else f"±{(floor - 1) * 100:.1f} %"


def where(arm: Arm) -> str:
    """Return the worker pool and its concurrency, such as `threads 16`, and what is not `auto`."""
    if arm.copy:
        return f"{arm.pool} {arm.concurrency} (again)"
    return f"{arm.pool} {arm.concurrency}" + ("" if arm.strategy == "auto" else f" ({arm.label})")


def name_in(kind: str, arm: Arm) -> str:
    """Return what tells an arm from the others of a contest of this kind."""
    return where(arm) if kind == "pools" else arm.label


def listed(items: Iterable[object]) -> str:
    """Return `a, b and c`."""
    *first, final = [str(item) for item in items] or [""]
    return f"{', '.join(first)} and {final}" if first else final


def count(n: int, one: str) -> str:
    """Return `1 worker` or `2 workers`."""
    return f"{n} {one}{'' if n == 1 else 's'}"
