"""The charts: matplotlib's SVG, with text as text, colours from the page and ids of its own."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.objective import Objective
from ..tasks.patterns import OURS, POOLS
from .statistics import METRICS, Ratio
from .summary import ContestSummary, Row, Standing, Summary, SweepSummary
from .tables import side_by_side
from .wording import count, factor, name_in, number, where

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, PAPER, GOOD, BAD, BAND = "#010101", "#020202", "#040404", "#060601", "#060602", "#060603"
SERIES = ("#050501", "#050502", "#050503", "#050504", "#050505")
VARIABLES = {
    INK: "ink", MUTED: "muted", "#030303": "grid", PAPER: "paper", GOOD: "good", BAD: "bad", BAND: "band",
    **{colour: f"series-{number}" for number, colour in enumerate(SERIES, start=1)},
}  # fmt: skip
"""Not colours, but which variable of the page stands in their place."""
STYLE = Path(__file__).with_name("alchemy.mplstyle")
COLOURS = Path(__file__).with_name("colours.css")
UNITS_PER_INCH, ROW, WIDEST = 72, 26, 8.0
POOL_COLOURS = dict(zip(POOLS, SERIES, strict=True))
MARKS = "osD^v"


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of so many CSS pixels, in our style, without matplotlib's global state of figures."""
    from matplotlib import rc_context, rc_params_from_file
    from matplotlib.figure import Figure

    with rc_context(rc_params_from_file(STYLE, use_default_template=False)):
        yield Figure(figsize=(width / UNITS_PER_INCH, height / UNITS_PER_INCH))


def _svg(drawn: Figure, name: str, label: str) -> str:
    """Return the figure as an `<svg>` element.

    Args:
        name: Prefix of the ids in it, unique in the page; letters, digits and `-`.
        label: What the chart shows, for those who do not see it.
    """
    out = io.StringIO()
    drawn.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # The style would hold for the whole page, which has the same rule for its charts; the font is the page's own.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;?\s*|\s(?:width|height)=\"[\d.]+pt\"", "", text)
    text = re.sub(r'font: ((?:[\w.]+ )*[\d.]+px) [^;"]*', r"font: \1 sans-serif", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'((?:xlink:)?href)="#', rf'\1="#{name}-', text).replace("url(#", f"url(#{name}-")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    width, said = drawn.get_figwidth() * UNITS_PER_INCH, html.escape(label, quote=True)
    text = text.replace("<svg ", f'<svg class="chart" role="img" aria-label="{said}" style="--width:{width:.0f}px" ', 1)
    return text.strip()


def standalone(chart: str) -> str:
    """Return a chart as a file of its own: it brings the colours, for light and dark, and its size."""
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', chart)[0]
    chart = re.sub(r' style="--width[^"]*"', f' width="{width}" height="{height}"', chart, count=1)
    start = chart.index(">") + 1
    font = "text { font-family: system-ui, sans-serif; }"
    return f"{chart[:start]}<style>{COLOURS.read_text(encoding='utf-8')}{font}</style>{chart[start:]}\n"


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Give the axes a named line for each row, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


# Ratios


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a forest plot."""

    name: str
    ratios: Mapping[str, Ratio]
    word: str = ""  # What is said instead of a ratio: that it is broken, or the reference


def of_contest(contest: ContestSummary) -> list[Line]:
    """Return the lines of a contest."""

    def line(row: Row) -> Line:
        word = row.word if row.broken else "is 1" if row.reference else ""
        return Line(name_in(contest.kind, row.arm), row.speed.ratios if row.speed else {}, word)

    return [line(row) for row in contest.rows]


def of_standings(standings: Sequence[Standing]) -> list[Line]:
    """Return the lines of all patterns under one worker pool, over all workloads."""

    def line(one: Standing) -> Line:
        wrong = "broken" if one.broken else "driver blocks" if one.blocked else "is 1"
        return Line(one.arm.label, one.ratios, "" if one.ratios else wrong)

    return [line(one) for one in standings]


def forest(title: str, lines: Sequence[Line], name: str) -> str | None:
    """Return ratios with their intervals, goodput beside CPU, on a logarithmic axis; None if there is no ratio."""
    metrics = [metric for metric in ("goodput", "cpu") if any(metric in line.ratios for line in lines)]
    if not metrics:
        return None
    with _figure(760, 106 + ROW * len(lines)) as drawn:
        for place, (axes, metric) in enumerate(
            zip(drawn.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True)
        ):
            _rows(axes, [line.name if not place else "" for line in lines])
            _forest(axes, lines, metric)
        drawn.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        drawn.supxlabel(
            "filled triangle: a difference is shown; open circle: none is; shaded: what identical arms differed by",
            fontsize=11, color=MUTED,
        )  # fmt: skip
        told = [
            f"{METRICS[metric].label}: "
            + ", ".join(
                f"{line.name} {factor(found.estimate.middle)} ({found.verdict})"
                for line in lines if (found := line.ratios.get(metric))
            )
            for metric in metrics
        ]  # fmt: skip
        wrong = ", ".join(f"{line.name} {line.word}" for line in lines if line.word)
        return _svg(drawn, name, f"Ratios of {title}. {'. '.join(told)}. {wrong}.")


def _forest(axes: Axes, lines: Sequence[Line], metric: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    found = [line.ratios[metric] for line in lines if metric in line.ratios]
    ends = [
        end for one in found for end in (one.estimate.low, one.estimate.middle, one.estimate.high, one.floor) if end
    ]
    far = min(WIDEST, max(1.15, *(max(end, 1 / end) * 1.05 for end in ends)))
    axes.set_xscale("log")
    axes.set_xlim(1 / far, far)
    narrow, wide = (0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5), (0.125, 0.25, 0.5, 1, 2, 4, 8)
    ticks = narrow if far < 1.6 else (0.5, 0.7, 1, 1.5, 2) if far < 3 else wide
    axes.set_xticks([tick for tick in ticks if 1 / far <= tick <= far])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x")
    if floors := [one.floor for one in found if one.floor]:
        axes.axvspan(1 / min(max(floors), far), min(max(floors), far), color=BAND, linewidth=0)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_title(f"{METRICS[metric].label} ({'right is faster' if metric == 'goodput' else 'left is cheaper'})")
    for place, line in enumerate(lines):
        if ratio := line.ratios.get(metric):
            _mark(axes, place, ratio, far)
        elif line.word:
            colour = MUTED if line.word == "is 1" else BAD
            frame = {"facecolor": PAPER, "edgecolor": colour, "boxstyle": "round,pad=0.15"}
            axes.text(1, place, line.word, ha="center", va="center", color=colour, fontsize=11, bbox=frame)


def _mark(axes: Axes, place: int, found: Ratio, far: float) -> None:
    def inside(value: float) -> float:
        return min(max(value, 1 / far), far)

    shown = found.better or found.worse
    colour, marker = (GOOD, "^") if found.better else (BAD, "v") if found.worse else (MUTED, "o")
    at = found.estimate
    if at.low is not None and at.high is not None:
        axes.plot([inside(at.low), inside(at.high)], [place, place], color=colour)
    axes.plot(
        [inside(at.middle)], [place], marker=marker, markersize=8, color=colour, clip_on=False, zorder=3,
        markerfacecolor=colour if shown else PAPER, markeredgewidth=1.6,
    )  # fmt: skip
    axes.text(1.01, place, factor(at.middle), transform=axes.get_yaxis_transform(), va="center", fontsize=11.5)


# Open load


def load(workload: str, sweeps: Sequence[SweepSummary], objective: Objective | None, name: str) -> str | None:
    """Return latency against the offered rate, one line for each sweep of each arm; None if nothing was measured."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    sweeps = [one for one in sweeps if one.steps]
    if not sweeps:
        return None
    which = objective.percentile if objective else "p95"
    with _figure(760, 380) as drawn:
        axes = drawn.subplots()
        for place, one in enumerate(sweeps):
            for turn, steps in enumerate(one.sweeps):
                points = [(step.offered_per_s, getattr(step.latency, which)) for step in steps if step.latency]
                axes.plot(
                    *zip(*points, strict=True) if points else ((), ()), color=POOL_COLOURS.get(one.arm.pool, MUTED),
                    marker=MARKS[place % len(MARKS)], markersize=5, linewidth=1.5,
                    linestyle="-" if one.arm.concurrency < 10 else "--", label=None if turn else where(one.arm),
                )  # fmt: skip
        if objective:
            axes.axhline(objective.limit_ms, color=BAD, linewidth=1, label=f"objective {objective}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlim(left=0)
        axes.grid()
        axes.set_xlabel("tasks per second offered")
        axes.set_ylabel(f"{which} in ms, from when a task was due")
        axes.set_title(workload)
        drawn.legend(loc="outside lower left", ncols=4)
        told = ", ".join(
            f"{where(one.arm)} {number(one.knee.middle)}/s in {one.knee.sweeps} sweeps" for one in sweeps if one.knee
        )
        return _svg(drawn, name, f"{which} latency against offered load, {workload}. Objective kept up to: {told}.")


# Demo


def demo(summary: Summary, name: str) -> str | None:
    """Return how many orders came out right, by worker pool: the recipe above ours; None if no demo was run."""
    lines = [(pool, row, times) for pool, row, times in side_by_side(summary) if row.counted]
    if not lines:
        return None
    with _figure(430, 110 + 36 * len(lines)) as drawn:
        axes = drawn.subplots()
        places: list[float] = []
        told = []
        for pool, row, times in lines:
            found = row.counted
            assert found is not None
            at = (places[-1] + (1.0 if row.arm.pattern == OURS else 1.45)) if places else 0.0
            places.append(at)
            right = found.right / found.sent if found.sent else 0.0
            axes.barh(at, right, height=0.8, color=GOOD)
            axes.barh(at, 1 - right, left=right, height=0.8, facecolor=PAPER, edgecolor=BAD, hatch="////", linewidth=1)
            left = f", {count(found.connections_left, 'connection')} left" if found.connections_left else ""
            said = f"{found.right} of {found.sent} right{left}{f', CPU {times:.2f}x' if times else ''}"
            frame = {"facecolor": PAPER, "edgecolor": "none", "boxstyle": "round,pad=0.2"}
            axes.text(0.015, at, said, va="center", fontsize=11.5, fontweight="bold", bbox=frame)
            told.append(f"{pool}, {row.arm.pattern}: {said}")
        axes.set_yticks(places, [row.arm.pattern for _, row, _ in lines], fontsize=11.5)
        for at, (pool, row, _) in zip(places, lines, strict=True):
            if row.arm.pattern != OURS:
                axes.text(-0.01, at - 0.62, pool, ha="right", va="center", fontweight="bold", fontsize=12)
        axes.set_ylim(max(places) + 0.6, -0.95)
        axes.set_xlim(0, 1)
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        drawn.suptitle("Orders that came out right (hatched: wrong or lost)", fontsize=12, fontweight="bold")
        return _svg(drawn, name, f"Orders that came out right. {'; '.join(told)}.")
