"""The same tables drawn: on a screen or two of the terminal, in Markdown, and as one page that needs only a browser."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from ..bench.results import Objective
from . import charts, tables
from .recommendation import RULE, UNDECIDED, Choice
from .statistics import ENOUGH
from .summary import Summary
from .tables import Table
from .wording import listed

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


def page(summary: Summary, found: Sequence[Choice]) -> str:
    """Return the whole page; its sections are those of the template, without those that have nothing to show."""
    from jinja2 import Environment, PackageLoader

    of, pools = summary.facts, dict.fromkeys(one.pool for one in summary.standings)
    objective = Objective.parse(of.objective) if of.objective else None
    standings = {pool: [one for one in summary.standings if one.pool == pool] for pool in pools}
    swept = dict.fromkeys(one.workload for one in summary.sweeps)
    environment = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        summary=summary, found=found, short=short(summary, found), rule=RULE, enough=ENOUGH, tables=tables,
        charts=charts,
        ratios=[
            charts.forest(f"{pool}, over all workloads", "", rows, f"all-{pool}") for pool, rows in standings.items()
        ],
        between=[
            charts.forest(one.name, one.kind, one.rows, f"pools-{place}")
            for place, one in enumerate(summary.of_kind("pools"))
        ],
        loads=[
            charts.load(name, [one for one in summary.sweeps if one.workload == name], objective, f"load-{place}")
            for place, name in enumerate(swept)
        ],
        colours=charts.COLOURS.read_text(encoding="utf-8"),
    )  # fmt: skip


def short(summary: Summary, found: Sequence[Choice]) -> list[str]:
    """Return what someone who was not there wants to know first."""
    chosen: dict[str, dict[str, list[str]]] = {}
    for one in found:
        said = UNDECIDED if one.choice.startswith(UNDECIDED) else one.choice.partition(" (")[0]
        chosen.setdefault(one.topic, {}).setdefault(said, []).append(one.subject)
    lines = [
        f"{topic}: {'; '.join(f'{choice} {listed(subjects)}'.strip() for choice, subjects in by_choice.items())}."
        for topic, by_choice in chosen.items()
    ]
    nothing = ["Nothing was measured, so nothing is recommended."]
    demo = tables.demo_in_short(summary)
    return [*demo, *([] if demo else [tables.correctness(summary)]), *(lines or nothing), *summary.flags]
