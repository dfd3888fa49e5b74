"""The summary for the terminal: what a run says, on a screen or two."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..patterns import OURS
from .charts import knee_words
from .reading import summarise
from .recommendation import Recommendation, recommend
from .standings import Standing, Tally
from .summary import ContestSummary, Row, Summary
from .wording import count, factor, grouped_flags, interval, mebibytes, name_in, number, percent, where

FEW = 8
"""With more contests than this, only how each pattern stands over all of them is printed."""
DETAIL = 200
"""Characters of what was found wrong; the page has all of it."""
STYLES = {"faster": "green", "cheaper": "green", "slower": "red", "dearer": "red"}


def print_summary(console: Console, directory: Path) -> None:
    """Print what a result directory says."""
    summary = summarise(directory)
    print_summary_of(console, summary, recommend(summary))


def print_summary_of(console: Console, summary: Summary, found: Recommendation) -> None:
    """Print what a run says: the contests, the sweeps, then the recommendation in short."""
    few = len(summary.contests) <= FEW
    for contest in summary.contests:
        if few:
            console.print()
            console.print(contest_table(contest))
        if few and contest.note:
            console.print(contest.note, style="yellow", markup=False)
        for row in contest.rows:
            for breach in row.breaches if few or row.arm.pattern == OURS else []:
                console.print(
                    f"{_name(contest, row)}: {breach.name}: no. {_cut(breach.detail)}", style="red", markup=False
                )
        for flag in grouped_flags(contest) if few else []:
            console.print(flag, style="yellow", markup=False, highlight=False)
    if not few:
        console.print()
        console.print(standings_table(found.standings))
        blocked = " (+n): not run, the driver blocks." if any(one.blocked for one in found.standings) else ""
        console.print(f"Over {len(summary.contests)} contests; the page has each of them.{blocked}", style="dim")
    if summary.measured:
        console.print("ours: celery-alchemy. No word: no difference shown. conn.: most seen / promised.", style="dim")
    if summary.sweeps:
        console.print()
        console.print(f"Objective {summary.facts.objective}, open load:", style="bold")
        for sweep in summary.sweeps:
            console.print(f"  {sweep.workload}, {where(sweep.arm)}: {knee_words(sweep)}", markup=False, highlight=False)
            for breach in sweep.breaches:
                console.print(f"    {breach.name}: no. {breach.detail}", style="red", markup=False)
    console.print()
    console.print("In short", style="bold")
    for line in [*found.in_short, *summary.flags]:
        console.print(Padding(Text(line), (0, 0, 0, 2)))
    console.print()


def contest_table(contest: ContestSummary) -> Table:
    """Return a contest as a table that fits 110 columns."""
    floor = percent(contest.floors.get("goodput"))
    batches = count(contest.batches, "batch", "batches")
    measured = f"{contest.rounds} rounds in {batches}, A/A floor {floor}" if contest.rounds else "checked only"
    table = _table(f"{contest.name}: {measured}")
    columns = ("arm", "ok", "ratio to the reference"), ("CPU\nms/task", "p50\nms", "p95\nms", "conn.", "MiB")
    for column in (*columns[0][:2], "goodput\n/s", columns[0][2], *columns[1]):
        table.add_column(column, justify="left" if column in columns[0] else "right", no_wrap=True)
    for row in contest.rows:
        table.add_row(Text(_name(contest, row)), *_cells(row))
    return table


def standings_table(standings: Sequence[Standing]) -> Table:
    """Return how each pattern stands over all contests as a table that fits 110 columns."""
    table = _table()
    table.add_column("pattern", no_wrap=True)
    for column in ("broken", "goodput,\nmean ratio (range)", "faster / slower\n/ not shown", "CPU,\nmean ratio (range)",
                   "cheaper / dearer\n/ not shown"):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for one in standings:
        blocked = f" (+{one.blocked})" if one.blocked else ""
        broken = Text(f"{one.broken}{blocked} of {one.cells}", style="bold red" if one.broken else "green")
        cells = [cell for name in ("goodput", "cpu") for cell in _tally(one.tallies[name])]
        table.add_row(Text(_short(one.pattern)), broken, *cells)
    return table


def _table(title: str | None = None) -> Table:
    return Table(
        box=box.HORIZONTALS, title=title, title_justify="left", pad_edge=False, show_edge=False, padding=(0, 1, 0, 0)
    )


def _tally(tally: Tally) -> tuple[str, str]:
    if not tally.contests:
        return "-", "-"
    middle = f"{factor(tally.middle)} ({factor(tally.least)} to {factor(tally.most)})"
    return middle, f"{tally.better} / {tally.worse} / {tally.neither}"


def _name(contest: ContestSummary, row: Row) -> str:
    return _short(name_in(contest, row))


def _cut(detail: str) -> str:
    return textwrap.shorten(detail, DETAIL, placeholder=" ...")


def _short(label: str) -> str:
    return label.replace(OURS, "ours", 1)


def _cells(row: Row) -> list[Text | str]:
    promised = "-" if row.promised_connections is None else row.promised_connections
    connections = f"{row.peak_connections}/{promised}"
    if row.broken:
        return [Text("blocks" if row.blocked else "BROKEN", style="bold red"), *["-"] * 7]
    if not (speed := row.speed):
        return [Text("ok", style="green"), *["-"] * 5, connections, mebibytes(row.pss_bytes)]
    goodput, cpu = row.ratio("goodput"), row.ratio("cpu")
    said = Text(f"{factor(goodput.estimate.median)} {interval(goodput.estimate)}" if goodput else "")
    if goodput and goodput.shown:
        said.append(f" {goodput.verdict}", STYLES[goodput.verdict])
    cost = Text(f"{cpu.verdict} " if cpu and cpu.shown else "", style=STYLES.get(cpu.verdict, "") if cpu else "")
    cost.append(number(speed.worker_cpu_ms), "default")
    return [
        Text("ok", style="green"),
        number(speed.goodput_per_s.median),
        said if goodput else "is the reference" if row.reference else "-",
        cost,
        number(speed.latency.p50) if speed.latency else "-",
        number(speed.latency.p95) if speed.latency else "-",
        connections,
        mebibytes(row.pss_bytes),
    ]
