"""The table: fault by way, what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rich.console import Console
from rich.table import Table

from ..patterns import OURS
from .faults import FAULTS
from .place import Damage
from .runs import Result

COLUMNS = [field.name for field in fields(Damage) if field.name != "tasks"]


def sums(results: Sequence[Result]) -> dict[str, dict[str, Damage]]:
    """Return the damage over all worker pools, by fault and way."""
    table: dict[str, dict[str, Damage]] = {}
    for result in results:
        row = table.setdefault(result.cell.fault, {})
        row[result.cell.way] = row.get(result.cell.way, Damage()) + result.damage
    return table


def in_words(damage: Damage) -> str:
    """Return what is not zero, largest columns by their names; `none` where nothing was damaged."""
    parts = [f"{getattr(damage, name)} {name}" for name in COLUMNS if getattr(damage, name)]
    return ", ".join(parts) or "none"


def _pools_hurt(results: Sequence[Result], fault: str, way: str) -> list[str]:
    return [r.cell.pool for r in results if (r.cell.fault, r.cell.way) == (fault, way) and r.damage.any]


def in_short(results: Sequence[Result]) -> list[str]:
    """Return the lines of one table over all faults, our strategies in one column: for a README."""
    found = sums(results)
    by_hand = list(dict.fromkeys(result.cell.way for result in results if result.cell.pattern != OURS))
    lines = [f"| fault | {' | '.join(by_hand)} | {OURS}, each strategy |", "|---|" + "---|" * (len(by_hand) + 1)]
    for name, row in found.items():
        ours = [damage for way, damage in row.items() if way not in by_hand]
        cells = [in_words(row[way]) if way in row else "" for way in by_hand]
        lines.append(f"| {name} | {' | '.join(cells)} | {in_words(sum(ours, Damage()))} |")
    return lines


def print_table(console: Console, results: Sequence[Result]) -> None:
    """Print the table, and which cells could not be run."""
    found = sums(results)
    ways = list(dict.fromkeys(result.cell.way for result in results))
    table = Table(title="Damage, over all worker pools", show_lines=True)
    table.add_column("fault")
    for way in ways:
        table.add_column(way)
    for fault, row in found.items():
        table.add_row(fault, *(in_words(row[way]) if way in row else "" for way in ways))
    console.print(table)
    for result in results:
        if result.failed:
            cell = result.cell
            console.print(
                f"[red]not run[/red]: {cell.fault}, {cell.pool}, {cell.way}: {result.failed.splitlines()[-1]}"
            )


def markdown(results: Sequence[Result], *, command: str, about: Sequence[str]) -> str:
    """Return the page for the documentation."""
    found = sums(results)
    ways = list(dict.fromkeys(result.cell.way for result in results))
    pools = list(dict.fromkeys(result.cell.pool for result in results))
    lines = [
        "# What each fault costs",
        "",
        f"Written by `{command}`; do not edit. Worker pools: {', '.join(pools)}. {' '.join(about)}",
        "",
        "Each cell is a worker of its own, on a database of its own, behind a proxy. Its tasks meet the fault, then a",
        "few ordinary ones follow. Counted over all worker pools:",
        "",
        "- *lost*: tasks that never ended;",
        "- *wrong*: tasks that succeeded without their rows, failed with them, wrote them twice, or had the Session or",
        "  the answer of another task;",
        "- *leaked*: slots of the connection pool that are taken while nothing runs;",
        "- *stuck*: sessions of the server in a statement or a transaction while nothing runs;",
        "- *needless*: tasks that failed, though the fault had not hit them.",
        "",
    ]
    lines += [*in_short(results), ""]
    for name, row in found.items():
        tasks = next(iter(row.values())).tasks
        lines += [f"## {name}", "", f"{FAULTS[name].summary} About {tasks} tasks each.", ""]
        lines += ["| way | lost | wrong | leaked | stuck | needless | under |", "|---|--:|--:|--:|--:|--:|---|"]
        for way in ways:
            if way in row:
                values = " | ".join(str(getattr(row[way], column) or "·") for column in COLUMNS)
                lines.append(f"| {way} | {values} | {', '.join(_pools_hurt(results, name, way)) or '·'} |")
        lines.append("")
    failed = [result for result in results if result.failed]
    if failed:
        lines += ["## Not run", ""]
        lines += [f"- {r.cell.fault}, {r.cell.pool}, {r.cell.way}: {r.failed.splitlines()[-1]}" for r in failed]
        lines.append("")
    return "\n".join(lines)
