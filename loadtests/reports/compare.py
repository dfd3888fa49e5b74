"""Two result directories: what became faster or slower, what broke or healed, and whether that is too much."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..bench.results import Arm, Batch, RunFacts, read_batches
from .reading import summarise
from .statistics import ENOUGH, METRICS, Estimate, distance, median_interval
from .summary import ContestSummary, Row, Summary
from .wording import factor, interval, listed, percent, where

PSS = "pss"
KNOWN = ("goodput", "cpu", "database_cpu", "p50", "p95", "p99", PSS)
WORDS = {
    "goodput": ("faster", "slower"), "cpu": ("cheaper", "dearer"), "database_cpu": ("cheaper", "dearer"),
    "p50": ("faster", "slower"), "p95": ("faster", "slower"), "p99": ("faster", "slower"), PSS: ("smaller", "larger"),
}  # fmt: skip
MEMORY_FLOOR = 1.05
"""Memory has no A/A floor of its own, and is measured once or a few times."""
HALF = 0.975
"""Of each of the two intervals: the quotient then covers the true one in at least 95 of 100 cases."""


@dataclass(frozen=True, slots=True)
class Condition:
    """Something that must not become this much worse."""

    metric: str
    share: float
    """How much worse it may become, such as 0.1."""

    @property
    def limit(self) -> float:
        """The ratio of the second directory to the first from which on it fails."""
        return 1 - self.share if self.metric == "goodput" else 1 + self.share

    def __str__(self) -> str:
        return f"{self.metric}:{'-' if self.metric == 'goodput' else '+'}{self.share * 100:g}%"


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
    worse = "-" if metric == "goodput" else "+"
    example = f"{metric}:{worse}10%"
    if not match:
        raise ValueError(f"{value.strip()!r} in {text!r} is not a share: write for example {example}.")
    sign, number, unit = match.groups()
    if not unit:
        raise ValueError(f"{value.strip()!r} in {text!r} has no unit: write for example {example}.")
    if sign and sign != worse:
        verb = "falling" if metric == "goodput" else "rising"
        raise ValueError(f"{text!r} would fail when things get better: {metric} gets worse by {verb}; write {example}.")
    share = float(number) / 100
    if metric == "goodput" and share >= 1:
        raise ValueError(f"{text!r} can never fail: goodput cannot fall by more than all of it.")
    return Condition(metric, share)


@dataclass(frozen=True, slots=True)
class Change:
    """How one arm of one contest differs between the two directories, by one metric."""

    contest: str
    arm: Arm
    metric: str
    estimate: Estimate
    """The second directory divided by the first; n is that of the smaller side."""
    verdict: str
    reason: str = ""
    """Why no difference is shown; empty if one is."""

    @property
    def shown(self) -> bool:
        """Whether there is a difference that may be claimed."""
        return not self.reason


@dataclass(frozen=True, slots=True)
class Failure:
    """A condition that one arm of one contest does not meet."""

    condition: Condition
    contest: str
    arm: Arm
    detail: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """The second directory against the first."""

    first: Path
    second: Path
    changes: list[Change]
    broken: list[tuple[str, Arm, str]]
    """Contest, arm and breach of what was right in the first and is broken in the second."""
    healed: list[tuple[str, Arm]]
    missing: list[str]
    """What only one of the two has."""
    caveats: list[str]
    """What else differs between the two."""
    conditions: list[Condition]
    unchecked: list[Condition]
    """Those for which no arm has both values: they neither hold nor fail."""
    failed: list[Failure]
    """Empty if all conditions are met: the exit code follows from it."""


def compare(first: Path, second: Path, conditions: Sequence[Condition] = ()) -> Comparison:
    """Compare the second result directory with the first.

    The two did not take turns, so what changed on the machine between them is in the ratios, and not in the intervals.
    """
    before, after = summarise(first), summarise(second)
    changes: list[Change] = []
    broken: list[tuple[str, Arm, str]] = []
    healed: list[tuple[str, Arm]] = []
    failed: list[Failure] = []
    slices_before, slices_after = (_batches(directory) for directory in (first, second))
    for old, new in _shared(before, after):
        for row, now in _rows(old, new):
            if now.broken and not row.broken:
                broken.append((old.name, now.arm, f"{now.breaches[0].name}: no. {now.breaches[0].detail}".strip()))
                failed += [Failure(one, old.name, now.arm, "it is broken now, and has no speed") for one in conditions]
            elif row.broken and not now.broken:
                healed.append((old.name, now.arm))
            elif row.speed and now.speed and not row.arm.copy:
                changes += _changes(old, new, row, now, slices_before[old.name], slices_after[new.name])
    compared = {change.metric for change in changes}
    failed += [failure for change in changes for one in conditions if (failure := _failure(one, change))]
    return Comparison(
        first=first,
        second=second,
        changes=changes,
        broken=broken,
        healed=healed,
        missing=_missing(before, after),
        caveats=_caveats(before.facts, after.facts),
        conditions=list(conditions),
        unchecked=[one for one in conditions if one.metric not in compared],
        failed=failed,
    )


def _batches(directory: Path) -> dict[str, list[Batch]]:
    found: dict[str, list[Batch]] = {}
    for batch in read_batches(directory):
        found.setdefault(batch.contest, []).append(batch)
    return found


def _shared(before: Summary, after: Summary) -> Iterator[tuple[ContestSummary, ContestSummary]]:
    for old in before.contests:
        if new := after.contest(old.name):
            yield old, new


def _rows(old: ContestSummary, new: ContestSummary) -> Iterator[tuple[Row, Row]]:
    for row in old.rows:
        if now := new.row(row.name):
            yield row, now


def _changes(
    old: ContestSummary, new: ContestSummary, row: Row, now: Row, before: list[Batch], after: list[Batch]
) -> Iterator[Change]:
    for metric in METRICS.values():
        old_values, new_values = (
            [value for batch in batches for one in batch.slices if one.arm == row.name
             and (value := metric.value(one)) is not None]
            for batches in (before, after)
        )  # fmt: skip
        floor = max(old.floors.get(metric.name, 1.0), new.floors.get(metric.name, 1.0))
        if change := _change(old.name, row.arm, metric.name, old_values, new_values, floor):
            yield change
    old_sizes, new_sizes = (
        [float(cell.pss_bytes) for batch in batches for cell in batch.cells if cell.arm == row.arm and cell.pss_bytes]
        for batches in (before, after)
    )
    if old_sizes and new_sizes:
        yield _memory(old.name, row.arm, old_sizes, new_sizes)


def _change(
    contest: str, arm: Arm, metric: str, before: list[float], after: list[float], floor: float
) -> Change | None:
    if not before or not after:
        return None
    old, new = median_interval(before, HALF), median_interval(after, HALF)
    if old.median == new.median == 0:
        return None
    n = min(old.n, new.n)
    median = _divide(new.median, old.median)
    if old.low is None or old.high is None or new.low is None or new.high is None:
        estimate = Estimate(n, median)
        reason = f"{n} slices are too few for an interval, which takes {ENOUGH + 1} on each side"
    else:
        # Each is outside its own interval in at most 2.5 of 100 cases, whatever the distribution.
        coverage = (old.coverage or 0) + (new.coverage or 0) - 1
        estimate = Estimate(n, median, _divide(new.low, old.high), _divide(new.high, old.low), coverage)
        within = distance(median) <= floor
        reason = (
            "the interval holds 1"
            if not estimate.excludes_one
            else f"within the A/A floor of {percent(floor)}"
            if within
            else ""
        )
    return Change(contest, arm, metric, estimate, _word(metric, median, reason), reason)


def _memory(contest: str, arm: Arm, before: list[float], after: list[float]) -> Change:
    """Compare memory, of which there is one value for each batch: by ranges, for there are too few for an interval."""
    median = _divide(statistics.median(after), statistics.median(before))
    apart = min(after) > max(before) or max(after) < min(before)
    reason = "" if apart else "the ranges of the batches overlap"
    if apart and distance(median) <= MEMORY_FLOOR:
        reason = f"less than {percent(MEMORY_FLOOR)}, as two identical workers may differ"
    estimate = Estimate(min(len(before), len(after)), median)
    return Change(contest, arm, PSS, estimate, _word(PSS, median, reason), reason)


def _word(metric: str, ratio: float, reason: str) -> str:
    better, worse = WORDS[metric]
    return "no difference shown" if reason else better if (ratio > 1) == (metric == "goodput") else worse


def _divide(above: float, below: float) -> float:
    return above / below if below else math.inf if above else 1.0


def _failure(condition: Condition, change: Change) -> Failure | None:
    if change.metric != condition.metric or not change.shown:
        return None
    ratio = change.estimate.median
    too_much = ratio < condition.limit if condition.metric == "goodput" else ratio > condition.limit
    if not too_much:
        return None
    said = f"{change.metric} {factor(ratio)} {interval(change.estimate)}, n = {change.estimate.n}: {change.verdict}"
    return Failure(condition, change.contest, change.arm, said)


def _missing(before: Summary, after: Summary) -> list[str]:
    found = []
    for one, other, which in ((before, after, "first"), (after, before, "second")):
        names = [contest.name for contest in one.contests if not other.contest(contest.name)]
        if names:
            found.append(f"only in the {which}: {listed(names)}")
        for contest in one.contests:
            if there := other.contest(contest.name):
                arms = [row.name for row in contest.rows if not there.row(row.name)]
                if arms:
                    found.append(f"only in the {which}, {contest.name}: {listed(arms)}")
    return found


def _caveats(before: RunFacts, after: RunFacts) -> list[str]:
    found = ["The two did not take turns: whatever changed on the machine in between is in the ratios."]
    for what, old, new in (
        ("machine", before.machine, after.machine),
        ("version", before.versions, after.versions),
        ("option", _flat(before), _flat(after)),
    ):
        for name in dict.fromkeys((*old, *new)):
            if old.get(name) != new.get(name):
                found.append(f"different {what}: {name} {old.get(name, '-')} there, {new.get(name, '-')} here")
    if before.services != after.services:
        found.append(f"different services: {', '.join(before.services)} there, {', '.join(after.services)} here")
    return found


def _flat(facts: RunFacts) -> dict[str, str]:
    found: dict[str, str] = {}
    for part, options in facts.options.items():
        items = options.items() if isinstance(options, dict) else [("", options)]
        found |= {f"{part} {name}".strip(): str(value) for name, value in items}
    return found


def _arm(contest: str, arm: Arm) -> str:
    return arm.label if contest.startswith("patterns/") else where(arm)


def print_comparison(console: Console, found: Comparison) -> None:
    """Print what changed: differences that are shown, what broke or healed, and the conditions."""
    shown = [change for change in found.changes if change.shown]
    if shown:
        table = Table(box=box.HORIZONTALS, pad_edge=False, show_edge=False)
        for column in ("contest", "arm", "metric", "ratio", "n", "it is now"):
            table.add_column(column, overflow="fold")
        for change in shown:
            better = change.verdict == WORDS[change.metric][0]
            table.add_row(
                Text(change.contest), Text(_arm(change.contest, change.arm)), change.metric,
                Text(f"{factor(change.estimate.median)} {interval(change.estimate)}"), str(change.estimate.n),
                Text(change.verdict, style="green" if better else "red"),
            )  # fmt: skip
        console.print(table)
    rest = len(found.changes) - len(shown)
    console.print(f"No difference shown in {rest} of {len(found.changes)} comparisons.", highlight=False)
    for contest, arm, breach in found.broken:
        console.print(f"Broken now: {contest}, {_arm(contest, arm)}: {breach}", style="bold red", markup=False)
    for contest, arm in found.healed:
        console.print(f"Healed: {contest}, {_arm(contest, arm)}", style="green", markup=False)
    for line in [*found.missing, *found.caveats]:
        console.print(line, style="dim", markup=False, highlight=False)
    for failure in found.failed:
        place = f"{failure.contest}, {_arm(failure.contest, failure.arm)}"
        console.print(f"Failed: {failure.condition}: {place}: {failure.detail}", style="bold red", markup=False)
    for condition in found.unchecked:
        console.print(f"Not checked: {condition}: no arm has it in both.", style="bold yellow", markup=False)
    met = [one for one in found.conditions if one not in found.unchecked]
    if met and not found.failed:
        console.print(f"Met: {', '.join(str(one) for one in met)}", style="green", markup=False)
