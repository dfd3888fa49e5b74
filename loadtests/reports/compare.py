"""Two result directories: what became faster or slower, and what broke or healed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ..bench.results import Arm, Batch
from .statistics import METRICS, NO_DIFFERENCE, Groups, Metric, Ratio, estimate, judged
from .summary import summarise
from .tables import ratio_cell, table
from .terminal import print_table
from .wording import name_in


class Change(NamedTuple):
    """How one arm of one contest differs between the two directories, by one metric."""

    place: str  # The contest and the arm, for people
    arm: Arm
    ratio: Ratio  # The second directory divided by the first


@dataclass(slots=True)
class Comparison:
    """The second directory against the first."""

    changes: list[Change] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # What was right in the first, with what does not hold now
    healed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # Contests and arms that only one of the two has


def compare(first: Path, second: Path) -> Comparison:
    """Compare the second result directory with the first.

    The two did not take turns, so what changed on the machine between them is in the ratios, and not in the intervals.
    """
    before, after, found = summarise(first), summarise(second), Comparison()
    for name in dict.fromkeys([*before.batches, *after.batches]):
        old, new = before.contest(name), after.contest(name)
        if not old or not new:
            found.missing.append(name)
            continue
        for arm in dict.fromkeys(row.arm for row in (*old.rows, *new.rows)):
            was, now, place = old.row(arm.name), new.row(arm.name), f"{name}, {name_in(old.kind, arm)}"
            if not was or not now:
                found.missing.append(place)
            elif was.broken or now.broken:
                found.healed += [] if now.broken else [place]
                found.broken += [] if was.broken else [f"{place}: {now.breaches[0].name}: no. {now.breaches[0].detail}"]
            elif was.speed and now.speed and not arm.copy:
                for metric in METRICS.values():
                    values = [_values(one.batches[name], arm, metric) for one in (after, before)]
                    floor = max(one.floors.get(metric.name, 1.0) for one in (old, new))
                    if all(values) and any(value for group in values[0] for value in group):
                        found.changes.append(Change(place, arm, judged(estimate(*values), metric, floor)))
    return found


def _values(batches: Sequence[Batch], arm: Arm, metric: Metric) -> Groups:
    """Return what was measured of an arm, worker by worker."""
    found = ([metric.value(one) for one in batch.slices if one.arm == arm.name] for batch in batches)
    return [known for values in found if (known := [one for one in values if one is not None])]


def print_comparison(console: Console, found: Comparison) -> None:
    """Print what broke or healed, and the differences that are shown."""
    shown = [one for one in found.changes if one.ratio.verdict != NO_DIFFERENCE]
    rows = ((one.place, METRICS[one.ratio.metric].label, ratio_cell(one.ratio)) for one in shown)
    for one in table("What changed", "arm | metric | second to first", rows):
        print_table(console, one)
    rest = len(found.changes) - len(shown)
    for style, lines in {
        "bold red": [f"Broken now: {one}" for one in found.broken],
        "green": [f"Healed: {one}" for one in found.healed],
        "dim": [
            *(f"Only in one of the two: {one}" for one in found.missing),
            f"No difference shown in {rest} of {len(found.changes)} comparisons.",
            "The two did not take turns: whatever changed on the machine in between is in the ratios.",
        ],
    }.items():
        for line in lines:
            console.print(line, style=style, markup=False, highlight=False)
