"""The counts that were committed, and what is above them.

A count depends on Python, on the libraries, and instructions on the processor and libc too. So what is compared is the
count with the layer as a multiple of the one by hand, in the same run, with what the same Python had.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("baseline.json")
TOLERANCE = 0.02  # A count may be so much above its baseline, as a share of that

#: By kind of count ("calls"), by where ("solo, local") and by row ("one SELECT").
Baseline = Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]]


class Count(NamedTuple):
    """One count per task."""

    kind: str
    where: str  # The worker pool and the strategy
    row: str
    with_layer: float
    by_hand: float = 1.0  # 1 where nothing is done by hand, or where the count is the same everywhere

    @property
    def multiple(self) -> float:
        """With the layer as a multiple of by hand."""
        return self.with_layer / self.by_hand

    def __str__(self) -> str:
        if self.by_hand == 1.0:
            return f"{self.with_layer:,.0f}"
        return f"{self.multiple:.3f} times the task by hand ({self.with_layer:,.0f} / {self.by_hand:,.0f})"


@dataclass(frozen=True, slots=True)
class Regression:
    """A count that is above its baseline."""

    count: Count
    baseline: Count
    share: float  # How much it is above, as a share of the baseline

    def __str__(self) -> str:
        where = f"{self.count.kind}, {self.count.where}, {self.count.row}"
        limit = f"({self.share:+.1%}, allowed {TOLERANCE:+.0%})"
        return f"{where}: {self.count}; the baseline is {self.baseline} {limit}"


def regressions(counts: Iterable[Count], baseline: Baseline) -> list[Regression]:
    """Return the counts that are above what `baseline` allows, the worst first; one it does not know is none."""
    found = []
    for count in counts:
        known = baseline.get(count.kind, {}).get(count.where, {}).get(count.row)
        if known is not None:
            before = count._replace(with_layer=known[0], by_hand=known[1])
            found.append(Regression(count, before, count.multiple / before.multiple - 1))
    return sorted((one for one in found if one.share > TOLERANCE), key=lambda one: -one.share)


def unknown(counts: Iterable[Count], baseline: Baseline) -> list[Count]:
    """Return the counts that `baseline` does not know."""
    return [one for one in counts if one.row not in baseline.get(one.kind, {}).get(one.where, {})]


def as_baseline(counts: Iterable[Count]) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """Return `counts` as they are written."""
    found: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for one in counts:
        where = found.setdefault(one.kind, {}).setdefault(one.where, {})
        where[one.row] = (round(one.with_layer), round(one.by_hand))
    return found


def key() -> str:
    """Return the name of this Python's baseline."""
    return ".".join(platform.python_version_tuple()[:2])


def _committed() -> dict[str, Baseline]:
    found: dict[str, Baseline] = json.loads(PATH.read_text()) if PATH.exists() else {}
    return found


def read() -> Baseline | None:
    """Return what was committed for this Python; None where nothing was."""
    return _committed().get(key())


def write(counts: Iterable[Count]) -> None:
    """Let `counts` be the baseline of this Python; kinds that were not counted stay."""
    baselines = _committed()
    baselines[key()] = {**baselines.get(key(), {}), **as_baseline(counts)}
    text = json.dumps(dict(sorted(baselines.items())), indent=1)
    # One line for each row: a change is read as one.
    lines = text.replace("[\n     ", "[").replace(",\n     ", ", ").replace("\n    ]", "]")
    PATH.write_text(f"{lines}\n")


def instructions(where: str, row: str, side: str) -> float:
    """Return the instructions of one task, of "ours" or by hand, as they are committed for Python 3.11.

    Args:
        where: Worker pool and strategy with no space between; in `row`, `_` stands for one.
    """
    kept = json.loads(PATH.read_text())["3.11"]["instructions"]
    with_layer, by_hand = kept[where.replace(",", ", ")][row.replace("_", " ")]
    return float(with_layer if side == "ours" else by_hand)
