"""How each pattern stands against ours over all contests: what is broken, and how often it is shown to be better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..patterns import OURS
from .statistics import CHEAPER, DEARER, FASTER, SLOWER, Ratio
from .summary import ContestSummary, Row, Summary


@dataclass(frozen=True, slots=True)
class Tally:
    """How often a pattern was shown to be better or worse than ours by one metric."""

    better: int = 0
    worse: int = 0
    neither: int = 0
    """No difference shown."""
    middle: float | None = None
    """Geometric mean of the medians."""
    least: float | None = None
    most: float | None = None

    @property
    def contests(self) -> int:
        """Contests with a ratio."""
        return self.better + self.worse + self.neither


@dataclass(frozen=True, slots=True)
class Standing:
    """A pattern over all contests: one line of the table in the README."""

    pattern: str
    pools: list[str]
    cells: int
    broken: int
    blocked: int
    """Cells whose driver blocks the green hub; not among the broken ones."""
    broken_under: list[str]
    """Worker pools."""
    tallies: dict[str, Tally] = field(default_factory=dict)


def is_better(found: Ratio | None) -> bool:
    return found is not None and found.verdict in {FASTER, CHEAPER}


def is_worse(found: Ratio | None) -> bool:
    return found is not None and found.verdict in {SLOWER, DEARER}


def standing(row: Row) -> float:
    found = row.ratio("goodput")
    if found:
        return found.estimate.median
    return 1.0 if row.reference else row.speed.goodput_per_s.median if row.speed else 0.0


def geometric(ratios: Sequence[float]) -> float:
    if any(value <= 0 for value in ratios):
        return 0.0
    return math.exp(sum(math.log(value) for value in ratios) / len(ratios))


def standings_of(summary: Summary) -> list[Standing]:
    contests = [found for found in summary.contests if found.kind == "patterns"]
    labels: dict[str, list[tuple[ContestSummary, Row]]] = {}
    for contest in contests:
        for row in contest.rows:
            if not row.arm.copy:
                labels.setdefault(row.arm.label, []).append((contest, row))
    # Ours first.
    labels = dict(sorted(labels.items(), key=lambda item: not item[0].startswith(OURS)))
    return [
        Standing(
            label,
            list(dict.fromkeys(contest.pool for contest, _ in found)),
            len(found),
            sum(row.broken and not row.blocked for _, row in found),
            sum(row.blocked for _, row in found),
            list(dict.fromkeys(contest.pool for contest, row in found if row.broken and not row.blocked)),
            {name: _tally([row for _, row in found], name) for name in ("goodput", "cpu", "database_cpu", "p95")},
        )
        for label, found in labels.items()
    ]


def _tally(rows: Sequence[Row], metric: str) -> Tally:
    ratios = [found for row in rows if (found := row.ratio(metric))]
    if not ratios:
        return Tally()
    medians = [found.estimate.median for found in ratios]
    better, worse = sum(map(is_better, ratios)), sum(map(is_worse, ratios))
    return Tally(
        better, worse, len(ratios) - better - worse, geometric(medians), min(medians), max(medians)
    )  # fmt: skip
