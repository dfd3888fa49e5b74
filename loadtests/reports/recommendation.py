"""What to choose: one rule for every contest, and the ratios that it goes by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..tasks.patterns import OURS
from .statistics import Ratio
from .summary import Summary
from .wording import where

RULE = (
    "An arm that broke an invariant is never chosen. The reference is chosen, unless another arm is shown to be "
    "faster, or cheaper in worker CPU and not slower; of several, the one with the highest goodput."
)

NO_EVIDENCE, UNDECIDED = "no evidence", "undecided"
Ratios = Mapping[str, Ratio]


@dataclass(frozen=True, slots=True)
class Choice:
    """What to set, by the rule."""

    topic: str  # `Worker pool`, `Strategy`, or `Choose` of a demo
    subject: str  # Such as `for select` or `under threads`
    choice: str
    against: str  # What it was compared with: the reference, or the best of the others where the reference is chosen
    goodput: Ratio | None
    """Of the first of the two to the second, or of the other to the reference where that is chosen."""
    cpu: Ratio | None
    changed: bool = False  # Whether it is another than the reference, which is what one gets by default


@dataclass(frozen=True, slots=True)
class Candidate:
    """An arm that can be chosen, with its ratios to the reference."""

    name: str
    ratios: Ratios


def _superior(ratios: Ratios) -> bool:
    goodput, cpu = ratios.get("goodput"), ratios.get("cpu")
    faster, cheaper = bool(goodput and goodput.better), bool(cpu and cpu.better)
    return faster or (cheaper and not (goodput and goodput.worse))


def _goodput(one: Candidate) -> float:
    return one.ratios["goodput"].estimate.middle if "goodput" in one.ratios else 0.0


def choose(topic: str, subject: str, reference: str, others: Iterable[Candidate]) -> Choice:
    """Return what the rule chooses."""
    others = list(others)
    better = [one for one in others if _superior(one.ratios)]
    best = max(better or others, key=_goodput, default=Candidate("nothing else was measured", {}))
    chosen, against = (best.name, reference) if better else (reference, best.name)
    goodput, cpu = best.ratios.get("goodput"), best.ratios.get("cpu")
    if goodput and goodput.estimate.low is None:
        chosen = f"{UNDECIDED}: too few workers; {reference}"
    return Choice(topic, subject, chosen, against, goodput, cpu, bool(better))


def recommend(summary: Summary) -> list[Choice]:
    """Return what to choose, as far as there is evidence: nothing where nothing was measured."""
    return [*_demo(summary), *_pools(summary), *_strategies(summary)]


def _pools(summary: Summary) -> Iterable[Choice]:
    for contest in summary.of_kind("pools"):
        place, own = ("Worker pool", f"for {contest.workload}"), contest.reference
        if own and own.broken:
            yield Choice(*place, NO_EVIDENCE, f"the reference is broken: {own.breaches[0].name}: no", None, None)
        elif own and own.speed:
            others = [row for row in contest.rows if not row.reference and not row.arm.copy]
            candidates = (Candidate(where(row.arm), row.speed.ratios) for row in others if row.speed)
            yield choose(*place, where(own.arm), candidates)


def _strategies(summary: Summary) -> Iterable[Choice]:
    for pool in dict.fromkeys(one.pool for one in summary.standings):
        ours = [one for one in summary.standings if one.pool == pool and one.arm.pattern == OURS]
        references = [row for one in summary.of_kind("patterns") if one.pool == pool and (row := one.reference)]
        own = next((row for row in references if row.arm.pattern == OURS), None)
        if own is None or not any(row.speed or row.broken for row in references):
            continue
        place, broken = ("Strategy", f"under {pool}"), next((row for row in references if row.broken), None)
        if broken:
            wrong = f"the reference is broken: {broken.breaches[0].name}: no"
            yield Choice(*place, NO_EVIDENCE, wrong, None, None)
            continue
        right = [one for one in ours if one.ratios and not one.broken]
        yield choose(
            *place, f"{own.arm.strategy or own.arm.pattern} ({own.strategy})",
            (Candidate(one.arm.strategy, one.ratios) for one in right),
        )  # fmt: skip


def _demo(summary: Summary) -> Iterable[Choice]:
    right: dict[str, list[bool]] = {}
    for contest in summary.of_kind("demo"):
        for row in contest.rows:
            right.setdefault(row.arm.pattern, []).append(not row.broken)
    if right:
        kept = {name: f"{name}, right under {sum(told)} of {len(told)} worker pools" for name, told in right.items()}
        best = max(right, key=lambda name: (sum(right[name]), name == OURS))
        rest = ", ".join(text for name, text in kept.items() if name != best)
        yield Choice("Choose", "", kept[best], rest or "nothing else was run", None, None)
