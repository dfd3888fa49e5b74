"""The charts: matplotlib's SVG, with text as text, colours from the page and ids of its own."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.results import Objective
from ..tasks.patterns import ASYNCIO, OURS, POOLS
from .statistics import METRICS, Ratio, estimate
from .summary import REFERENCE, Row, Standing, Summary, SweepSummary
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
POOL_COLOURS = {**dict(zip(POOLS, SERIES, strict=True)), ASYNCIO: MUTED}
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


def _rows(axes: Axes, names: Sequence[str], rows: int) -> None:
    """Give the axes a line for each row, with its name if there are any, the first on top."""
    axes.set_yticks(range(rows), names or [""] * rows)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def forest(title: str, kind: str, rows: Sequence[Row | Standing], name: str) -> str | None:
    """Return ratios with their intervals, goodput beside CPU, on a logarithmic axis; None if there is no ratio.

    Args:
        kind: Of the contests that the rows are of.
    """
    metrics = [metric for metric in ("goodput", "cpu") if any(metric in row.ratios for row in rows)]
    if not metrics:
        return None
    names = [name_in(kind, row.arm) for row in rows]
    with _figure(760, 106 + ROW * len(rows)) as drawn:
        for place, metric in enumerate(metrics):
            axes = drawn.add_subplot(1, len(metrics), place + 1)
            _rows(axes, [] if place else names, len(rows))
            _forest(axes, rows, metric)
        drawn.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        drawn.supxlabel(
            "filled triangle: a difference is shown; open circle: none is; shaded: what identical arms differed by",
            fontsize=11, color=MUTED,
        )  # fmt: skip
        told = "".join(
            f"{METRICS[metric].label}: "
            + ", ".join(
                f"{said} {factor(row.ratios[metric].estimate.middle)} ({row.ratios[metric].verdict})"
                for said, row in zip(names, rows, strict=True) if metric in row.ratios
            ) + ". "
            for metric in metrics
        )  # fmt: skip
        wrong = ", ".join(
            f"{said} {row.word}" for said, row in zip(names, rows, strict=True) if row.word and not row.ratios
        )
        return _svg(drawn, name, f"Ratios of {title}. {told}{wrong}.")


def _forest(axes: Axes, rows: Sequence[Row | Standing], metric: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    found = [row.ratios[metric] for row in rows if metric in row.ratios]
    ends = [end for one in found for at in [one.estimate] for end in (at.low, at.middle, at.high, one.floor) if end]
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
    for place, row in enumerate(rows):
        if ratio := row.ratios.get(metric):
            _mark(axes, place, ratio, far)
        elif row.word:
            colour = MUTED if row.word == REFERENCE else BAD
            frame = {"facecolor": PAPER, "edgecolor": colour, "boxstyle": "round,pad=0.15"}
            axes.text(1, place, row.word, ha="center", va="center", color=colour, fontsize=11, bbox=frame)


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


def demo(summary: Summary, name: str) -> str | None:
    """Return how many orders came out right, by worker pool: the recipe above ours; None if no demo was run."""
    lines = [(pool, row, times) for pool, row, times in side_by_side(summary) if row.counted]
    if not lines:
        return None
    with _figure(430, 110 + 36 * len(lines)) as drawn:
        axes = drawn.subplots()
        places, told = list[float](), list[str]()
        for pool, row, times in lines:
            found = row.counted
            assert found is not None
            at = (places[-1] + (1.0 if row.arm.pattern == OURS else 1.45)) if places else 0.0
            if row.arm.pattern != OURS:
                axes.text(-0.01, at - 0.62, pool, ha="right", va="center", fontweight="bold", fontsize=12)
            places.append(at)
            right = found.right / found.sent if found.sent else 0.0
            axes.barh(at, right, height=0.8, color=GOOD)
            axes.barh(at, 1 - right, left=right, height=0.8, facecolor=PAPER, edgecolor=BAD, hatch="////", linewidth=1)
            left = f", {count(found.connections_left, 'connection')} left" if found.connections_left else ""
            left += f", CPU {factor(estimate(times).middle)}x" if times else ""
            said = f"{found.right} of {found.sent} right{left}"
            frame = {"facecolor": PAPER, "edgecolor": "none", "boxstyle": "round,pad=0.2"}
            axes.text(0.015, at, said, va="center", fontsize=11.5, fontweight="bold", bbox=frame)
            told.append(f"{pool}, {row.arm.pattern}: {said}")
        axes.set_yticks(places, [row.arm.pattern for _, row, _ in lines], fontsize=11.5)
        axes.set_ylim(max(places) + 0.6, -0.95)
        axes.set_xlim(0, 1)
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0)
        axes.spines[:].set_visible(False)
        drawn.suptitle("Orders that came out right (hatched: wrong or lost)", fontsize=12, fontweight="bold")
        return _svg(drawn, name, f"Orders that came out right. {'; '.join(told)}.")
