"""What to choose: one rule for every contest, and the ratios that it goes by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..tasks.patterns import OURS
from .statistics import Ratio
from .summary import Row, Summary
from .wording import where

RULE = (
    "An arm that broke an invariant is never chosen. The reference is chosen, unless another arm is shown to be "
    "faster, or cheaper in worker CPU and not slower; of several, the one with the highest goodput."
)
NO_EVIDENCE, UNDECIDED = "no evidence", "undecided"


@dataclass(frozen=True, slots=True)
class Choice:
    """What to set, by the rule."""

    topic: str  # `Worker pool`, `Strategy`, or `Choose` of a demo
    subject: str  # Such as `for select` or `under threads`
    choice: str
    against: str  # What it was compared with: the reference, or the best of the others where the reference is chosen
    goodput: Ratio | None = None
    """Of the first of the two to the second, or of the other to the reference where that is chosen."""
    cpu: Ratio | None = None
    changed: bool = False  # Whether it is another than the reference, which is what one gets by default


def choose(topic: str, subject: str, reference: str, others: Mapping[str, Mapping[str, Ratio]]) -> Choice:
    """Return what the rule chooses.

    Args:
        others: Ratios to the reference, by the names of the arms that can be chosen instead.
    """
    goodputs = {name: ratios["goodput"] for name, ratios in others.items() if "goodput" in ratios}
    better = {
        name for name, ratios in others.items()
        if (name in goodputs and goodputs[name].better)
        or ("cpu" in ratios and ratios["cpu"].better and not (name in goodputs and goodputs[name].worse))
    }  # fmt: skip
    speeds = {name: ratio.estimate.middle for name, ratio in goodputs.items()}
    best = max(better or others, key=lambda name: speeds.get(name, 0.0), default="nothing else was measured")
    chosen, against = (best, reference) if better else (reference, best)
    ratios = others.get(best, {})
    goodput, cpu = ratios.get("goodput"), ratios.get("cpu")
    if goodput and goodput.estimate.low is None:
        chosen = f"{UNDECIDED}: too few workers; {reference}"
    return Choice(topic, subject, chosen, against, goodput, cpu, bool(better))


def recommend(summary: Summary) -> list[Choice]:
    """Return what to choose, as far as there is evidence: nothing where nothing was measured."""
    found = list(_demo(summary))
    for contest in summary.of_kind("pools"):
        rows = [row for row in contest.rows if row.speed and not row.reference and not row.arm.copy]
        others = {where(row.arm): row.ratios for row in rows}
        own = where(contest.reference.arm)
        found += _chosen("Worker pool", f"for {contest.workload}", [contest.reference], own, others)
    for pool in dict.fromkeys(one.pool for one in summary.standings):
        references = [one.reference for one in summary.of_kind("patterns") if one.pool == pool]
        ours = [one for one in summary.standings if one.pool == pool and one.arm.pattern == OURS]
        others = {one.arm.strategy: one.ratios for one in ours if one.ratios and not one.broken}
        if (first := references[0]).arm.pattern == OURS:
            own = f"{first.arm.strategy} ({first.cells[0].strategy})"
            found += _chosen("Strategy", f"under {pool}", references, own, others)
    return found


def _chosen(
    topic: str, subject: str, references: Iterable[Row], own: str, others: Mapping[str, Mapping[str, Ratio]]
) -> Iterator[Choice]:
    if broken := next((row for row in references if row.broken), None):
        yield Choice(topic, subject, NO_EVIDENCE, f"the reference is broken: {broken.breaches[0].name}: no")
    elif any(row.speed for row in references):
        yield choose(topic, subject, own, others)


def _demo(summary: Summary) -> Iterator[Choice]:
    right: dict[str, list[bool]] = {}
    for contest in summary.of_kind("demo"):
        for row in contest.rows:
            right.setdefault(row.arm.pattern, []).append(not row.broken)
    if right:
        kept = {name: f"{name}, right under {sum(told)} of {len(told)} worker pools" for name, told in right.items()}
        best = max(right, key=lambda name: (sum(right[name]), name == OURS))
        rest = ", ".join(text for name, text in kept.items() if name != best)
        yield Choice("Choose", "", kept[best], rest or "nothing else was run")
