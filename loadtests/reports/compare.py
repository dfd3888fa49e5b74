"""Two result directories: what became faster or slower, what broke or healed, and whether that is too much."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ..bench.results import Arm, Batch, RunFacts
from .statistics import METRICS, NO_DIFFERENCE, Estimate, Groups, Metric, Ratio, estimate, judged
from .summary import Row, Summary, summarise
from .tables import Cell, Table, ratio_cell
from .terminal import print_table
from .wording import interval, listed, name_in, sizes

MEMORY = Metric("pss", "memory", lambda one: None, "larger", "smaller")
KNOWN = {**METRICS, "pss": MEMORY}
MEMORY_FLOOR = 1.05  # Memory has no A/A floor of its own, and is measured once or a few times


@dataclass(frozen=True, slots=True)
class Condition:
    """Something that must not become this much worse."""

    metric: str
    share: float  # How much worse it may become, such as 0.1

    @property
    def limit(self) -> float:
        """The ratio of the second directory to the first from which on it fails."""
        return 1 - self.share if KNOWN[self.metric].higher_is_better else 1 + self.share

    def fails(self, ratio: Ratio) -> bool:
        """Return whether a difference is shown, and is too much."""
        middle = ratio.estimate.middle
        beyond = middle < self.limit if KNOWN[self.metric].higher_is_better else middle > self.limit
        return ratio.metric == self.metric and ratio.verdict != NO_DIFFERENCE and beyond

    def __str__(self) -> str:
        return f"{self.metric}:{'-' if KNOWN[self.metric].higher_is_better else '+'}{self.share * 100:g}%"


def parse_condition(text: str) -> Condition:
    """Return the condition behind `goodput:-10%` or `p95:+20%`.

    Raises:
        ValueError: It is not spelled like that, or would fail when things get better.
    """
    metric, colon, value = (part.strip() for part in text.partition(":"))
    metric = metric.replace("-", "_")
    if not colon:
        raise ValueError(f"{text!r} is not a condition: write a metric and how much worse it may become: goodput:-10%.")
    if metric not in KNOWN:
        raise ValueError(f"{metric!r} in {text!r} cannot be compared. Known: {', '.join(KNOWN)}.")
    match = re.fullmatch(r"([+-]?)(\d+(?:\.\d+)?)\s*(%?)", value)
    worse, verb = ("-", "falling") if KNOWN[metric].higher_is_better else ("+", "rising")
    example = f"{metric}:{worse}10%"
    if not match or not match[3]:
        wrong = "has no unit" if match else "is not a share"
        raise ValueError(f"{value!r} in {text!r} {wrong}: write for example {example}.")
    if match[1] and match[1] != worse:
        raise ValueError(f"{text!r} would fail when things get better: {metric} gets worse by {verb}; write {example}.")
    found = Condition(metric, float(match[2]) / 100)
    if found.limit <= 0:
        raise ValueError(f"{text!r} can never fail: {metric} cannot fall by more than all of it.")
    return found


class Change(NamedTuple):
    """How one arm of one contest differs between the two directories, by one metric."""

    contest: str
    arm: Arm
    ratio: Ratio  # The second directory divided by the first


class Failure(NamedTuple):
    """A condition that one arm of one contest does not meet."""

    condition: Condition
    contest: str
    arm: Arm
    detail: str


@dataclass(slots=True)
class Comparison:
    """The second directory against the first."""

    conditions: Sequence[Condition]
    changes: list[Change] = field(default_factory=list)
    broken: list[tuple[str, Arm, str]] = field(default_factory=list)
    """Contest, arm and breach of what was right in the first and is broken in the second."""
    healed: list[tuple[str, Arm]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # What only one of the two has
    caveats: list[str] = field(default_factory=list)  # What else differs between the two
    failed: list[Failure] = field(default_factory=list)
    """Empty if all conditions are met: the exit code follows from it."""

    @property
    def unchecked(self) -> list[Condition]:
        """Conditions for which no arm has both values: they neither hold nor fail."""
        compared = {change.ratio.metric for change in self.changes}
        return [one for one in self.conditions if one.metric not in compared]


def compare(first: Path, second: Path, conditions: Sequence[Condition] = ()) -> Comparison:
    """Compare the second result directory with the first.

    The two did not take turns, so what changed on the machine between them is in the ratios, and not in the intervals.
    """
    before, after = summarise(first), summarise(second)
    found = Comparison(conditions, missing=list(_missing(before, after)), caveats=_caveats(before.facts, after.facts))
    for old in before.contests:
        new = after.contest(old.name)
        for row, now in ((row, new.row(row.arm.name)) for row in old.rows) if new else ():
            if not now or not new:
                continue
            if now.broken and not row.broken:
                breach = f"{now.breaches[0].name}: no. {now.breaches[0].detail}".strip()
                found.broken.append((old.name, now.arm, breach))
                broken = "it is broken now, and has no speed"
                found.failed += [Failure(one, old.name, now.arm, broken) for one in conditions]
            elif row.broken and not now.broken:
                found.healed.append((old.name, now.arm))
            elif row.speed and now.speed and not row.arm.copy:
                batches = before.batches[old.name], after.batches[old.name]
                floors = {name: max(old.floors.get(name, 1.0), new.floors.get(name, 1.0)) for name in METRICS}
                found.changes += (Change(old.name, row.arm, ratio) for ratio in _ratios(row, now, *batches, floors))
    for contest, arm, ratio in found.changes:
        said = f"{ratio.metric} {interval(ratio.estimate)}, {sizes(ratio.estimate)}: {ratio.verdict}"
        found.failed += [Failure(one, contest, arm, said) for one in conditions if one.fails(ratio)]
    return found


def _ratios(
    old: Row, new: Row, before: Sequence[Batch], after: Sequence[Batch], floors: Mapping[str, float]
) -> Iterator[Ratio]:
    for name, metric in METRICS.items():
        was, now = (_values(batches, old.arm, metric) for batches in (before, after))
        if was and now and any(value for group in (*was, *now) for value in group):
            yield judged(estimate(now, was), metric, floors[name])
    sizes_of = [sorted(float(cell.pss_bytes) for cell in row.cells if cell.pss_bytes) for row in (old, new)]
    if all(sizes_of):
        yield _memory(*sizes_of)


def _values(batches: Sequence[Batch], arm: Arm, metric: Metric) -> Groups:
    """Return what was measured of an arm, worker by worker."""
    found = ([metric.value(one) for one in batch.slices if one.arm == arm.name] for batch in batches)
    return [known for values in found if (known := [one for one in values if one is not None])]


def _memory(was: Sequence[float], now: Sequence[float]) -> Ratio:
    """Compare memory, of which there are few values: by ranges."""
    found = estimate([[size] for size in now], [[size] for size in was])
    found = Estimate(found.workers, found.rounds, found.middle)
    reason = ""
    if now[0] <= was[-1] and now[-1] >= was[0]:
        reason = "the ranges of the restarts overlap"
    elif max(found.middle, 1 / found.middle) <= MEMORY_FLOOR:
        reason = f"less than {MEMORY_FLOOR - 1:.0%}, as two identical workers may differ"
    verdict = MEMORY.above if found.middle > 1 else MEMORY.below
    return Ratio("pss", found, NO_DIFFERENCE if reason else verdict, reason)


def _missing(before: Summary, after: Summary) -> Iterator[str]:
    for one, other, which in ((before, after, "first"), (after, before, "second")):
        if names := [contest.name for contest in one.contests if not other.contest(contest.name)]:
            yield f"only in the {which}: {listed(names)}"
        for contest in one.contests:
            there = other.contest(contest.name)
            if there and (arms := [row.arm.name for row in contest.rows if not there.row(row.arm.name)]):
                yield f"only in the {which}, {contest.name}: {listed(arms)}"


def _caveats(before: RunFacts, after: RunFacts) -> list[str]:
    there, here = (
        {
            **{f"machine: {name}": value for name, value in facts.machine.items()},
            **{f"version: {name}": value for name, value in facts.versions.items()},
            **{f"option: {part} {name}": value for part, of in facts.options.items() for name, value in of.items()},
            "services:": ", ".join(facts.services),
        }
        for facts in (before, after)
    )
    differ = [name for name in {**there, **here} if there.get(name, "-") != here.get(name, "-")]
    return [
        "The two did not take turns: whatever changed on the machine in between is in the ratios.",
        *(f"different {name} {there.get(name, '-')} there, {here.get(name, '-')} here" for name in differ),
    ]


def print_comparison(console: Console, found: Comparison) -> None:
    """Print what changed: differences that are shown, what broke or healed, and the conditions."""

    def place(contest: str, arm: Arm) -> str:
        return f"{contest}, {name_in(contest.partition('/')[0], arm)}"

    rows = [
        [Cell(place(contest, arm)), Cell(KNOWN[ratio.metric].label), ratio_cell(ratio), Cell(sizes(ratio.estimate))]
        for contest, arm, ratio in found.changes if ratio.verdict != NO_DIFFERENCE
    ]  # fmt: skip
    if rows:
        print_table(console, Table("What changed", ("arm", "metric", "second to first", "from, at least"), rows))
    rest = len(found.changes) - len(rows)
    console.print(f"No difference shown in {rest} of {len(found.changes)} comparisons.", highlight=False)
    met = [str(one) for one in found.conditions if one not in found.unchecked]
    lines = [
        *(("bold red", f"Broken now: {place(contest, arm)}: {breach}") for contest, arm, breach in found.broken),
        *(("green", f"Healed: {place(contest, arm)}") for contest, arm in found.healed),
        *(("dim", line) for line in (*found.missing, *found.caveats)),
        *(("bold red", f"Failed: {one}: {place(where, arm)}: {said}") for one, where, arm, said in found.failed),
        *(("bold yellow", f"Not checked: {one}: no arm has it in both.") for one in found.unchecked),
        *([("green", f"Met: {', '.join(met)}")] if met and not found.failed else []),
    ]
    for style, line in lines:
        console.print(line, style=style, markup=False, highlight=False)
