"""The summary for the terminal and for Markdown: the same tables, on a screen or two."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from . import tables
from .page import short
from .recommendation import RULE, Choice
from .summary import Summary
from .tables import Table

FEW = 8  # With more contests than this, only how each pattern stands over all of them is printed
DETAIL = 160  # Characters of a cell
STYLES = {"good": "green", "bad": "red", "broken": "bold red", "muted": "dim"}
OF_CONTEST = ("right", "goodput /s", "ratio", "CPU ms/task", "p95 ms", "connections")


def print_summary(console: Console, summary: Summary, found: Sequence[Choice]) -> None:
    """Print what a run says: the demo or the contests, the open loads, then what to choose."""
    shown = tables.demo(summary)
    contests = [one for one in summary.contests if one.kind != "demo"]
    if len(contests) <= FEW:
        shown += [table.only(*OF_CONTEST) for one in contests for table in tables.contest(one)]
        # What breaks in a demo is many lines, and its one table shows what comes of it; the page has them.
        shown += [table.only("invariant", "found") for table in tables.breaches(summary) if contests]
    else:
        shown += [table.only("broken", "goodput", "worker CPU per task") for table in tables.standings(summary)]
    shown += [one.only("tasks/s kept", "p99 ms", "p99.9 ms", "late", "skipped") for one in tables.open_loads(summary)]
    choices = tables.choices(found)
    for table in [*shown, *choices]:
        console.print()
        print_table(console, table)
    console.print()
    for line in [*short(summary, found), *([RULE] if choices else [])]:
        console.print(line, markup=False, highlight=False)


def print_table(console: Console, table: Table) -> None:
    """Print one table: what does not fit is folded, never cut."""
    drawn = Drawn(box=box.HORIZONTALS, title=Text(table.title), title_justify="left", pad_edge=False, show_edge=False)
    for name in table.columns:
        drawn.add_column(name, overflow="fold")
    for row in table.rows:
        # The page has all of a long cell.
        texts = (cell.text if len(cell.text) <= DETAIL else f"{cell.text[:DETAIL]} ..." for cell in row)
        drawn.add_row(*(Text(text, style=STYLES.get(cell.style, "")) for text, cell in zip(texts, row, strict=True)))
    console.print(drawn)
    if table.note:
        console.print(table.note, style="dim", markup=False, highlight=False)


def markdown(summary: Summary, found: Sequence[Choice]) -> str:
    """Return the same for a README or the summary of a CI job."""
    shown = [*tables.demo(summary), *tables.choices(found), *tables.standings(summary), *tables.open_loads(summary)]
    lead = "\n".join(f"- {_escape(line)}" for line in short(summary, found))
    return "\n\n".join([lead, *(f"{one.title}\n\n{markdown_table(one)}" for one in shown)]) + "\n"


def markdown_table(table: Table) -> str:
    """Return a table in Markdown, without its title."""
    marked = [[f"**{cell.text}**" if cell.style in {"good", "bad", "broken"} else cell.text for cell in row]
              for row in table.rows]  # fmt: skip
    lines = [table.columns, ["---"] * len(table.columns), *marked]
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
