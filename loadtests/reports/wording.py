"""How numbers are written, wherever they are shown."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..bench.results import Arm
from .statistics import METRICS, Estimate, Ratio
from .summary import ContestSummary, Row
from .together import PoolRatio, PoolStanding


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with as many significant digits as it deserves; a dash for none."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def factor(value: float | None) -> str:
    """Return a ratio, such as `0.92`."""
    if value is None:
        return "-"
    return "∞" if math.isinf(value) else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def interval(estimate: Estimate) -> str:
    """Return `[0.88, 0.97]`, or that there is none."""
    if estimate.low is None or estimate.high is None:
        return "(no interval)"
    return f"[{factor(estimate.low)}, {factor(estimate.high)}]"


def ratio(found: Ratio | None) -> str:
    """Return `0.92 [0.88, 0.97]`."""
    return f"{factor(found.estimate.median)} {interval(found.estimate)}" if found else "-"


def evidence(found: Ratio) -> str:
    """Return a ratio with everything it rests on."""
    coverage = found.estimate.coverage
    sure = f", {coverage:.1%} interval" if coverage else ""
    floor = f", A/A floor {percent(found.floor)}" if found.floor is not None else ""
    doubt = f" ({found.reason})" if found.reason else ""
    batches = f" in {len(found.batches)} batches" if len(found.batches) > 1 else ""
    return (
        f"{METRICS[found.metric].label} {ratio(found)}, n = {found.estimate.n} rounds{batches}{sure}{floor}: "
        f"{found.verdict}{doubt}"
    )


def together(found: PoolStanding) -> str:
    """Return what is said of a pattern over all workloads of a worker pool."""
    return "; ".join(
        f"{METRICS[name].label} {pool_ratio(one)}, n = {one.estimate.n} batches of {count(one.workloads, 'workload')}, "
        f"A/A floor {percent(one.floor)}: {one.verdict}" + (f" ({one.reason})" if one.reason else "")
        for name, one in found.ratios.items()
    )


def pool_ratio(found: PoolRatio | None) -> str:
    """Return `0.92 [0.88, 0.97]`."""
    return f"{factor(found.estimate.median)} {interval(found.estimate)}" if found else "-"


def percent(floor: float | None) -> str:
    """Return how far a factor is from 1, such as `±6 %`."""
    if floor is None:
        return "-"
    return "∞" if math.isinf(floor) else f"±{(floor - 1) * 100:.1f} %"


def mebibytes(size: float | None) -> str:
    """Return bytes as MiB."""
    return f"{size / 2**20:.0f}" if size else "-"


def where(arm: Arm) -> str:
    """Return the worker pool and its concurrency, such as `threads 16`, and what is not `auto`."""
    rest = "" if arm.strategy == "auto" and not arm.copy else f" ({arm.label})" if not arm.copy else " (again)"
    return f"{arm.pool} {arm.concurrency}{rest}"


def at(arm: Arm) -> str:
    """Return `threads at concurrency 16`: as `where`, for a sentence."""
    return where(arm).replace(f"{arm.pool} {arm.concurrency}", f"{arm.pool} at concurrency {arm.concurrency}", 1)


def name_in(contest: ContestSummary, row: Row) -> str:
    """Return what tells an arm from the others of its contest."""
    return row.arm.label if contest.kind == "patterns" else where(row.arm)


def grouped_flags(contest: ContestSummary) -> list[str]:
    """Return each kind of flag once, with the rows that have it."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for row in contest.rows:
        for flag in row.flags:
            kind, _, rest = flag.partition(": ")
            kinds.setdefault(kind, []).append((name_in(contest, row), rest))
    measured = sum(row.speed is not None for row in contest.rows)
    return [
        f"{kind} in {'all' if len(found) == measured else f'{len(found)} of {measured}'} rows"
        + (f" ({listed(name for name, _ in found)})" if len(found) < measured else "")
        + f"; {found[0][0]}: {found[0][1]}."
        for kind, found in kinds.items()
    ]


def listed(items: Iterable[object], last: str = "and") -> str:
    """Return `a, b and c`."""
    *first, final = [str(item) for item in items] or [""]
    return f"{', '.join(first)} {last} {final}" if first else final


def count(n: int, one: str, many: str = "") -> str:
    """Return `1 worker` or `2 workers`."""
    return f"{n} {one if n == 1 else many or one + 's'}"
