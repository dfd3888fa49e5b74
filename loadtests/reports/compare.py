"""Two result directories: what became faster or slower, what broke or healed, and whether that is too much."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from ..bench.results import Arm, Batch, RunFacts, read_batches
from .reading import summarise, worker_values
from .statistics import LARGER, METRICS, NO_DIFFERENCE, SMALLER, Estimate, Groups, Metric, Ratio, judged, quotient
from .summary import ContestSummary, Row, Summary
from .tables import Cell, Table, ratio_cell
from .terminal import print_table
from .wording import interval, listed, name_in, sizes

MEMORY = Metric("pss", "memory", lambda one: None, False, SMALLER, LARGER)
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

    def __str__(self) -> str:
        return f"{self.metric}:{'-' if KNOWN[self.metric].higher_is_better else '+'}{self.share * 100:g}%"


def parse_condition(text: str) -> Condition:
    """Return the condition behind `goodput:-10%` or `p95:+20%`.

    Raises:
        ValueError: It is not spelled like that, or would fail when things get better.
    """
    metric, colon, value = text.strip().partition(":")
    metric = metric.strip().replace("-", "_")
    if not colon:
        raise ValueError(f"{text!r} is not a condition: write a metric and how much worse it may become: goodput:-10%.")
    if metric not in KNOWN:
        raise ValueError(f"{metric!r} in {text!r} cannot be compared. Known: {', '.join(KNOWN)}.")
    match = re.fullmatch(r"\s*([+-]?)(\d+(?:\.\d+)?)\s*(%?)\s*", value)
    worse, verb = ("-", "falling") if KNOWN[metric].higher_is_better else ("+", "rising")
    example = f"{metric}:{worse}10%"
    if not match:
        raise ValueError(f"{value.strip()!r} in {text!r} is not a share: write for example {example}.")
    sign, number, unit = match.groups()
    if not unit:
        raise ValueError(f"{value.strip()!r} in {text!r} has no unit: write for example {example}.")
    if sign and sign != worse:
        raise ValueError(f"{text!r} would fail when things get better: {metric} gets worse by {verb}; write {example}.")
    found = Condition(metric, float(number) / 100)
    if found.limit <= 0:
        raise ValueError(f"{text!r} can never fail: {metric} cannot fall by more than all of it.")
    return found


@dataclass(frozen=True, slots=True)
class Change:
    """How one arm of one contest differs between the two directories, by one metric."""

    contest: str
    arm: Arm
    ratio: Ratio  # The second directory divided by the first


@dataclass(frozen=True, slots=True)
class Failure:
    """A condition that one arm of one contest does not meet."""

    condition: Condition
    contest: str
    arm: Arm
    detail: str


@dataclass(slots=True)
class Comparison:
    """The second directory against the first."""

    conditions: list[Condition]
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
    old_batches, new_batches = _batches(first), _batches(second)
    found = Comparison(list(conditions))
    for old in before.contests:
        if not (new := after.contest(old.name)):
            continue
        for row in old.rows:
            if not (now := new.row(row.name)):
                continue
            if now.broken and not row.broken:
                breach = f"{now.breaches[0].name}: no. {now.breaches[0].detail}".strip()
                found.broken.append((old.name, now.arm, breach))
                found.failed += [
                    Failure(one, old.name, now.arm, "it is broken now, and has no speed") for one in conditions
                ]
            elif row.broken and not now.broken:
                found.healed.append((old.name, now.arm))
            elif row.speed and now.speed and not row.arm.copy:
                found.changes += _changes(old, new, row, old_batches[old.name], new_batches[old.name])
    found.failed += [failure for change in found.changes for one in conditions if (failure := _failure(one, change))]
    found.missing += _missing(before, after)
    found.caveats += _caveats(before.facts, after.facts)
    return found


def _batches(directory: Path) -> dict[str, list[Batch]]:
    found: defaultdict[str, list[Batch]] = defaultdict(list)
    for batch in read_batches(directory):
        found[batch.contest].append(batch)
    return found


def _changes(
    old: ContestSummary, new: ContestSummary, row: Row, before: list[Batch], after: list[Batch]
) -> Iterator[Change]:
    for metric in METRICS.values():
        was, now = (worker_values(batches, row.name, metric.name) for batches in (before, after))
        if was and now and any(value for group in (*was, *now) for value in group):
            floor = max(old.floors.get(metric.name, 1.0), new.floors.get(metric.name, 1.0))
            yield Change(old.name, row.arm, judged(quotient(now, was), metric, floor))
    was, now = (
        [[float(cell.pss_bytes)] for batch in batches for cell in batch.cells if cell.arm == row.arm and cell.pss_bytes]
        for batches in (before, after)
    )
    if was and now:
        yield Change(old.name, row.arm, _memory(was, now))


def _memory(was: Groups, now: Groups) -> Ratio:
    """Compare memory, of which there are few values: by ranges."""
    found = quotient(now, was)
    found = Estimate(found.workers, found.rounds, found.middle)
    old, new = (sorted(size for worker in sizes_of for size in worker) for sizes_of in (was, now))
    if new[0] > old[-1] or new[-1] < old[0]:
        small = max(found.middle, 1 / found.middle) <= MEMORY_FLOOR
        reason = f"less than {MEMORY_FLOOR - 1:.0%}, as two identical workers may differ" if small else ""
    else:
        reason = "the ranges of the restarts overlap"
    return Ratio("pss", found, NO_DIFFERENCE if reason else MEMORY.word(found.middle), reason)


def _failure(condition: Condition, change: Change) -> Failure | None:
    found, middle = change.ratio, change.ratio.estimate.middle
    if found.metric != condition.metric or found.verdict == NO_DIFFERENCE:
        return None
    if (middle < condition.limit) is not KNOWN[condition.metric].higher_is_better or middle == condition.limit:
        return None
    said = f"{found.metric} {interval(found.estimate)}, {sizes(found.estimate)}: {found.verdict}"
    return Failure(condition, change.contest, change.arm, said)


def _missing(before: Summary, after: Summary) -> Iterator[str]:
    for one, other, which in ((before, after, "first"), (after, before, "second")):
        if names := [contest.name for contest in one.contests if not other.contest(contest.name)]:
            yield f"only in the {which}: {listed(names)}"
        for contest in one.contests:
            there = other.contest(contest.name)
            if there and (arms := [row.name for row in contest.rows if not there.row(row.name)]):
                yield f"only in the {which}, {contest.name}: {listed(arms)}"


def _caveats(before: RunFacts, after: RunFacts) -> Iterator[str]:
    yield "The two did not take turns: whatever changed on the machine in between is in the ratios."
    for what, old, new in (
        ("machine", before.machine, after.machine),
        ("version", before.versions, after.versions),
        ("option", _flat(before), _flat(after)),
        ("services", {"": ", ".join(before.services)}, {"": ", ".join(after.services)}),
    ):
        for name in dict.fromkeys((*old, *new)):
            if old.get(name) != new.get(name):
                yield f"different {what}: {name} {old.get(name, '-')} there, {new.get(name, '-')} here".replace(
                    "  ", " "
                )


def _flat(facts: RunFacts) -> dict[str, str]:
    return {f"{part} {name}": str(value) for part, options in facts.options.items() for name, value in options.items()}


def print_comparison(console: Console, found: Comparison) -> None:
    """Print what changed: differences that are shown, what broke or healed, and the conditions."""

    def place(contest: str, arm: Arm) -> str:
        return f"{contest}, {name_in(contest.partition('/')[0], arm)}"

    shown = [one for one in found.changes if one.ratio.verdict != NO_DIFFERENCE]
    rows = [
        [Cell(place(one.contest, one.arm)), Cell(KNOWN[one.ratio.metric].label), ratio_cell(one.ratio),
         Cell(sizes(one.ratio.estimate))]
        for one in shown
    ]  # fmt: skip
    if rows:
        print_table(console, Table("What changed", ("arm", "metric", "second to first", "from, at least"), rows))
    rest = len(found.changes) - len(shown)
    console.print(f"No difference shown in {rest} of {len(found.changes)} comparisons.", highlight=False)
    met = [one for one in found.conditions if one not in found.unchecked]
    lines = [
        *(("bold red", f"Broken now: {place(contest, arm)}: {breach}") for contest, arm, breach in found.broken),
        *(("green", f"Healed: {place(contest, arm)}") for contest, arm in found.healed),
        *(("dim", line) for line in (*found.missing, *found.caveats)),
        *(
            ("bold red", f"Failed: {one.condition}: {place(one.contest, one.arm)}: {one.detail}")
            for one in found.failed
        ),
        *(("bold yellow", f"Not checked: {one}: no arm has it in both.") for one in found.unchecked),
        *([("green", f"Met: {', '.join(map(str, met))}")] if met and not found.failed else []),
    ]
    for style, line in lines:
        console.print(line, style=style, markup=False, highlight=False)
