"""The charts of the page. Each says the same by place, shape or words as by colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .statistics import METRICS, Ratio
from .summary import BLOCKED, BROKEN, ContestSummary, Row, Summary, SweepSummary
from .svg import BAD, BAND, GOOD, GRID, INK, MUTED, PAPER, SERIES, drawing, figure, to_svg
from .wording import factor, listed, number, percent, where

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 920.0
ROW = 24.0
POOL_MARKS = {"prefork": "s", "threads": "o", "gevent": "^", "eventlet": "v", "solo": "D"}
POOL_COLOURS = dict(zip(POOL_MARKS, SERIES, strict=True))
PHASES = (
    ("queue", "queue", SERIES[0], ""),
    ("checkout", "waiting for a connection", SERIES[1], "///"),
    ("database", "database", SERIES[2], "---"),
    ("rest", "the rest of the run", SERIES[3], "xx"),
)
WIDEST = 8.0
"""A ratio axis reaches this far at most; what is beyond is drawn at its end, with its number."""


def _horizontal(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _after(axes: Axes, end: float, place: float, text: str, colour: str = INK) -> None:
    """Write something behind the end of a bar."""
    axes.annotate(text, (end, place), xytext=(5, 0), textcoords="offset points", va="center", color=colour)


def _name(row: Row, contest: ContestSummary) -> str:
    name = row.arm.label if contest.kind == "patterns" else where(row.arm)
    return f"{name} = 1" if row.reference else name


def forest(contest: ContestSummary, name: str) -> str | None:
    """Return goodput and worker CPU per task of a contest, as ratios to its reference; None if there is no ratio."""
    rows = [row for row in contest.rows if row.broken or row.speed]
    if not any(row.ratio("goodput") or row.ratio("cpu") for row in rows):
        return None
    metrics = [metric for metric in ("goodput", "cpu") if any(row.ratio(metric) for row in rows)]
    with drawing():
        drawn = figure(WIDTH, 84 + ROW * len(rows))
        panels = drawn.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        _horizontal(panels[0], [_name(row, contest) for row in rows])
        for axes, metric in zip(panels, metrics, strict=True):
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            _forest_panel(axes, rows, metric, contest.floors.get(metric))
        _verdict_legend(drawn)
        said = _forest_words(contest, rows, metrics)
        return to_svg(drawn, name, said)


def _forest_panel(axes: Axes, rows: Sequence[Row], metric: str, floor: float | None) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    ratios = [found for row in rows if (found := row.ratio(metric))]
    far = max([1.25, *(_reach(found) for found in ratios), min(floor or 1.0, WIDEST)])
    far = min(far * 1.08, WIDEST)
    axes.set_xscale("log")
    axes.set_xlim(1 / far, far)
    ticks = [tick for tick in (0.125, 0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4, 8) if 1 / far <= tick <= far]
    if far > 2.2:
        ticks = [tick for tick in ticks if tick in {0.125, 0.25, 0.5, 1, 2, 4, 8}]
    elif far > 1.6:
        ticks = [tick for tick in ticks if tick in {0.5, 0.7, 1, 1.5, 2}]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", linewidth=0.8)
    axes.set_axisbelow(True)
    if floor is not None:
        edge = min(floor, far)
        axes.axvspan(1 / edge, edge, color=BAND, linewidth=0)
    axes.axvline(1, color=INK, linewidth=1)
    higher = METRICS[metric].higher_is_better
    side = "right is faster" if higher else "left is cheaper"
    axes.set_title(f"{METRICS[metric].label} ({side})", loc="left", fontweight="bold")
    for place, row in enumerate(rows):
        found = row.ratio(metric)
        if row.broken:
            frame = {"facecolor": PAPER, "edgecolor": BAD, "linewidth": 1, "boxstyle": "round,pad=0.15"}
            axes.text(
                1, place, row.word, ha="center", va="center", color=BAD, fontweight="bold", fontsize=11, bbox=frame
            )
        elif found:
            _mark(axes, place, found, far)
        elif row.reference:
            axes.plot([1], [place], marker="|", markersize=12, color=INK)
        else:
            axes.text(1, place, "not measured", ha="center", va="center", color=MUTED, fontsize=11)


def _reach(found: Ratio) -> float:
    ends = [found.estimate.median, found.estimate.low or found.estimate.median, found.estimate.high or 1.0]
    return max(max(end, 1 / end) if end > 0 and math.isfinite(end) else WIDEST for end in ends)


def _mark(axes: Axes, place: int, found: Ratio, far: float) -> None:
    def inside(value: float) -> float:
        return min(max(value, 1 / far), far)

    better = found.verdict in {"faster", "cheaper"}
    colour = GOOD if better else BAD if found.shown else MUTED
    marker = "o" if not found.shown else "^" if better else "v"
    if found.estimate.low is not None and found.estimate.high is not None:
        axes.plot([inside(found.estimate.low), inside(found.estimate.high)], [place, place], color=colour, linewidth=2)
    axes.plot(
        [inside(found.estimate.median)],
        [place],
        marker=marker,
        markersize=8,
        color=colour,
        markerfacecolor=colour if found.shown else PAPER,
        markeredgewidth=1.6,
        clip_on=False,
        zorder=3,
    )
    axes.text(
        1.01, place, factor(found.estimate.median), transform=axes.get_yaxis_transform(), va="center", fontsize=11.5
    )


def _verdict_legend(drawn: object) -> None:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    assert isinstance(drawn, Figure)

    def mark(marker: str, colour: str, face: str, label: str) -> Line2D:
        return Line2D(
            [], [], marker=marker, color=colour, markerfacecolor=face, markersize=8, markeredgewidth=1.6, label=label
        )

    handles = [
        mark("^", GOOD, GOOD, "shown to be better"),
        mark("v", BAD, BAD, "shown to be worse"),
        mark("o", MUTED, PAPER, "no difference shown"),
        Patch(facecolor=BAND, label="A/A floor"),
    ]
    drawn.legend(handles=handles, loc="outside lower left", ncols=4)


def _forest_words(contest: ContestSummary, rows: Sequence[Row], metrics: Sequence[str]) -> str:
    parts = []
    for metric in metrics:
        told = [
            f"{_name(row, contest)} {factor(found.estimate.median)} ({found.verdict})"
            for row in rows
            if (found := row.ratio(metric))
        ]
        parts.append(f"{METRICS[metric].label}: {', '.join(told)}; A/A floor {percent(contest.floors.get(metric))}")
    for word in (BROKEN, BLOCKED):
        if names := [_name(row, contest) for row in rows if row.broken and row.word == word]:
            parts.append(f"{word}: {', '.join(names)}")
    return f"Forest plot of {contest.name}. {'. '.join(parts)}."


def latency(workload: str, sweeps: Sequence[SweepSummary], summary: Summary, name: str) -> str | None:
    """Return latency against offered load, a panel for each arm; None if no sweep of this workload is right."""
    shown = [sweep for sweep in sweeps if sweep.steps and any(step.latency for step in sweep.steps)]
    if not shown:
        return None
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    objective = summary.objective
    with drawing():
        drawn = figure(WIDTH if columns > 1 else 620, 50 + 250 * lines)
        grid = drawn.subplots(lines, columns, sharey=True, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for place, (axes, sweep) in enumerate(zip(grid.flat, shown, strict=False)):
            _latency_panel(axes, sweep)
            if objective:
                axes.axhline(
                    objective.limit_ms, color=BAD, linewidth=1.3, linestyle=(0, (5, 3)), label=f"objective {objective}"
                )
            axes.set_title(where(sweep.arm), loc="left", fontweight="bold")
            axes.xaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
            axes.set_xlim(left=0)
            if place % columns == 0:
                axes.set_ylabel("latency, ms")
            if place >= len(shown) - columns:
                axes.set_xlabel("offered, tasks/s")
        first = grid.flat[0]
        first.set_yscale("log")
        low, high = first.get_ylim()
        candidates = [10**power * step for power in range(-2, 6) for step in (1, 2, 5)]
        ticks = [tick for tick in candidates if low <= tick <= high]
        first.set_yticks(ticks if len(ticks) < 8 else [tick for tick in ticks if f"{tick:g}"[0] == "1"])
        first.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
        first.yaxis.set_minor_locator(NullLocator())
        handles = {
            label: handle
            for axes in grid.flat[: len(shown)]
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        drawn.legend(handles=list(handles.values()), labels=list(handles), loc="outside lower left", ncols=5)
        told = "; ".join(f"{where(sweep.arm)}: {knee_words(sweep)}" for sweep in shown)
        return to_svg(drawn, name, f"Latency against offered load, {workload}. {told}.")


def _latency_panel(axes: Axes, sweep: SweepSummary) -> None:
    styles = (("p50", SERIES[0], "o", "-"), ("p95", SERIES[1], "s", "-"), ("p99", SERIES[2], "^", (0, (2, 1.5))))
    steps = [step for step in sweep.steps if step.latency]
    for percentile, colour, marker, line in styles:
        axes.plot(
            [step.offered_per_s for step in steps],
            [max(float(getattr(step.latency, percentile)), 0.01) for step in steps],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.8,
            linestyle=line,
            label=percentile,
        )
    if sweep.knee:
        low = sweep.at_objective.offered_per_s if sweep.at_objective else 0.0
        axes.axvspan(low, sweep.knee.offered_per_s, color=BAND, linewidth=0, label="the knee is in here")
    axes.grid(linewidth=0.8)
    axes.set_axisbelow(True)


def knee_words(sweep: SweepSummary) -> str:
    """Return where the objective broke, in words."""
    if sweep.breaches:
        return "broken"
    if sweep.at_objective and sweep.knee:
        return f"kept up to {number(sweep.at_objective.offered_per_s)}/s, not at {number(sweep.knee.offered_per_s)}/s"
    if sweep.at_objective:
        return f"kept up to {number(sweep.at_objective.offered_per_s)}/s, where the sweep ended"
    return f"kept at no rate, not even at {number(sweep.steps[0].offered_per_s)}/s" if sweep.steps else "not measured"


def throughput(workload: str, sweeps: Sequence[SweepSummary], summary: Summary, name: str) -> str | None:
    """Return the highest offered rate within the objective, by arm; None if no arm kept it."""
    if not any(sweep.at_objective for sweep in sweeps):
        return None
    rows = sorted(sweeps, key=lambda sweep: -(sweep.at_objective.offered_per_s if sweep.at_objective else 0))
    with drawing():
        drawn = figure(WIDTH, 56 + ROW * len(rows))
        axes = drawn.subplots()
        _horizontal(axes, [where(sweep.arm) for sweep in rows])
        for place, sweep in enumerate(rows):
            if sweep.at_objective is None:
                said = "broken" if sweep.breaches else "kept at no rate"
                _after(axes, 0, place, said, BAD if sweep.breaches else MUTED)
                continue
            rate = sweep.at_objective.offered_per_s
            axes.barh(place, rate, height=0.6, color=SERIES[0])
            end = number(rate) if sweep.knee else f"{number(rate)} or more: the sweep ended there"
            _after(axes, rate, place, end)
        axes.set_xlim(0, 1.25 * max(sweep.at_objective.offered_per_s for sweep in rows if sweep.at_objective))
        axes.set_xlabel(f"tasks/s offered within {summary.facts.objective}")
        told = "; ".join(f"{where(sweep.arm)}: {knee_words(sweep)}" for sweep in rows)
        return to_svg(drawn, name, f"Throughput at the objective {summary.facts.objective}, {workload}. {told}.")


def _by_arm(contests: Sequence[ContestSummary]) -> Mapping[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for contest in contests:
        for row in contest.rows:
            if not row.broken and not row.arm.copy:
                label = where(row.arm) if contest.kind == "pools" else f"{row.arm.pool} {row.arm.label}"
                rows.setdefault(label, []).append(row)
    order = list(POOL_MARKS)

    def place(rows: list[Row]) -> tuple[int, int]:
        pool = rows[0].arm.pool
        return order.index(pool) if pool in order else len(order), rows[0].arm.concurrency

    return dict(sorted(rows.items(), key=lambda item: place(item[1])))


def connections(contests: Sequence[ContestSummary], name: str) -> str | None:
    """Return the most connections seen, against concurrency and what was promised; None if none were seen."""
    rows = {label: found for label, found in _by_arm(contests).items() if any(row.peak_connections for row in found)}
    if not rows:
        return None
    from matplotlib.ticker import MaxNLocator

    with drawing():
        drawn = figure(WIDTH, 84 + ROW * len(rows))
        axes = drawn.subplots()
        _horizontal(axes, list(rows))
        told = []
        for place, (label, found) in enumerate(rows.items()):
            peak = max(row.peak_connections for row in found)
            promised = max(
                (row.promised_connections for row in found if row.promised_connections is not None), default=None
            )
            concurrency = found[0].arm.concurrency
            axes.plot([0, max(peak, promised or 0)], [place, place], color=GRID, linewidth=1.5, zorder=1)
            if promised is not None:
                axes.plot(
                    [promised],
                    [place],
                    marker="D",
                    color=SERIES[1],
                    markerfacecolor=PAPER,
                    markersize=8,
                    markeredgewidth=1.6,
                    linestyle="",
                    label="promised at most",
                    zorder=2,
                )
            axes.plot(
                [concurrency],
                [place],
                marker="|",
                color=INK,
                markersize=15,
                markeredgewidth=2,
                linestyle="",
                label="concurrency",
                zorder=3,
            )
            axes.plot(
                [peak], [place], marker="o", color=SERIES[0], markersize=7, linestyle="", label="most seen", zorder=4
            )
            bound = f"{promised} promised" if promised is not None else "no bound known"
            told.append(f"{label}: {peak} seen, {bound}, concurrency {concurrency}")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.grid(axis="x", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("connections to the database, all processes of the worker together")
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        drawn.legend(handles=list(unique.values()), labels=list(unique), loc="outside lower left", ncols=3)
        return to_svg(drawn, name, f"Connections. {'; '.join(told)}.")


def memory(contests: Sequence[ContestSummary], name: str) -> str | None:
    """Return the memory of the worker by arm, the median over workloads; None if it was not measured."""
    rows = {
        label: sorted(row.pss_bytes for row in found if row.pss_bytes) for label, found in _by_arm(contests).items()
    }
    rows = {label: sizes for label, sizes in rows.items() if sizes}
    if not rows:
        return None
    with drawing():
        drawn = figure(WIDTH, 56 + ROW * len(rows))
        axes = drawn.subplots()
        _horizontal(axes, list(rows))
        middles = [sizes[len(sizes) // 2] / 2**20 for sizes in rows.values()]
        axes.barh(range(len(rows)), middles, height=0.6, color=SERIES[0])
        for place, size in enumerate(middles):
            _after(axes, size, place, f"{size:.0f}")
        axes.set_xlim(0, max(middles) * 1.12)
        axes.set_xlabel("MiB (PSS), all processes of the worker, after the load")
        told = ", ".join(f"{label} {size:.0f} MiB" for label, size in zip(rows, middles, strict=True))
        return to_svg(drawn, name, f"Memory. {told}.")


def phases(contest: ContestSummary, name: str) -> str | None:
    """Return where the time of a task goes, by arm: medians of its phases; None if none were measured."""
    rows = [row for row in contest.rows if row.speed and row.speed.phases.get("run") and not row.arm.copy]
    if not rows:
        return None
    from matplotlib.patches import Patch

    with drawing():
        drawn = figure(WIDTH, 84 + ROW * len(rows))
        axes = drawn.subplots()
        _horizontal(axes, [_name(row, contest).removesuffix(" = 1") for row in rows])
        told = []
        ends = []
        for place, row in enumerate(rows):
            parts = phase_medians(row)
            left = 0.0
            for key, _, colour, hatch in PHASES:
                axes.barh(
                    place,
                    parts[key],
                    left=left,
                    height=0.64,
                    facecolor=colour,
                    edgecolor=PAPER,
                    hatch=hatch,
                    linewidth=0.6,
                )
                left += parts[key]
            _after(axes, left, place, number(left))
            ends.append(left)
            told.append(f"{_name(row, contest)}: " + ", ".join(f"{key} {number(parts[key])}" for key, *_ in PHASES))
        axes.set_xlim(0, max(ends) * 1.12 or 1)
        axes.set_xlabel("ms, sum of the median of each phase")
        handles = [
            Patch(facecolor=colour, edgecolor=PAPER, hatch=hatch, label=label) for _, label, colour, hatch in PHASES
        ]
        drawn.legend(handles=handles, loc="outside lower left", ncols=4)
        return to_svg(drawn, name, f"Phases of {contest.name}, in ms. {listed(told)}.")


def phase_medians(row: Row) -> dict[str, float]:
    """Return the medians of queue, checkout and database, and what they leave of the run's."""
    known = row.speed.phases if row.speed else {}
    found = {key: known[key].p50 if key in known else 0.0 for key in ("queue", "checkout", "database", "run")}
    rest = max(0.0, found.pop("run") - found["checkout"] - found["database"])
    return {**found, "rest": rest}
