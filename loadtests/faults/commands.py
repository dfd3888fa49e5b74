"""`celery alchemy faults`: cause faults, and compare what they cost."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..services.rundir import run_directory
from ..services.starting import broker, database_server
from ..tasks.patterns import OURS, POOLS
from . import runs
from .faults import FAULTS
from .place import Damage
from .runs import Result

SEED = 20261125
COLUMNS = [field.name for field in fields(Damage) if field.name != "tasks"]
HEAD = """\
# What each fault costs

Written by `{command}`; do not edit. Worker pools: {pools}. {about}

Each cell is a worker of its own, on a database of its own, behind a proxy. Its tasks meet the fault, then a
few ordinary ones follow. Counted over all worker pools:

- *lost*: tasks that never ended;
- *wrong*: tasks that succeeded without their rows, failed with them, wrote them twice, or had the Session or
  the answer of another task;
- *leaked*: slots of the connection pool that are taken while nothing runs;
- *stuck*: sessions of the server in a statement or a transaction while nothing runs;
- *needless*: tasks that failed, though the fault had not hit them.
"""


def in_words(damage: Damage) -> str:
    """Return what is not zero, largest columns by their names; `none` where nothing was damaged."""
    return ", ".join(f"{getattr(damage, name)} {name}" for name in COLUMNS if getattr(damage, name)) or "none"


def sums(results: Sequence[Result]) -> dict[str, dict[str, Damage]]:
    """Return the damage over all worker pools, by fault and way."""
    table: dict[str, dict[str, Damage]] = {}
    for result in results:
        row = table.setdefault(result.cell.fault, {})
        row[result.cell.way] = row.get(result.cell.way, Damage()) + result.damage
    return table


def print_table(console: Console, results: Sequence[Result]) -> None:
    """Print the table, and which cells could not be run."""
    ways = list(dict.fromkeys(result.cell.way for result in results))
    table = Table("fault", *ways, title="Damage, over all worker pools", show_lines=True)
    for fault, row in sums(results).items():
        table.add_row(fault, *(in_words(row[way]) if way in row else "" for way in ways))
    console.print(table)
    for result in results:
        if result.failed:
            console.print(f"[red]not run[/red]: {result.cell}: {result.failed.splitlines()[-1]}")


def markdown(results: Sequence[Result], *, command: str, about: Sequence[str]) -> str:
    """Return the page for the documentation: one table over all faults, ours in one column, then one for each fault."""
    found = sums(results)
    pools = ", ".join(dict.fromkeys(result.cell.pool for result in results))
    by_hand = list(dict.fromkeys(result.cell.way for result in results if result.cell.pattern != OURS))
    lines = [HEAD.format(command=command, pools=pools, about=" ".join(about))]
    lines += [f"| fault | {' | '.join(by_hand)} | {OURS}, each strategy |", "|---|" + "---|" * (len(by_hand) + 1)]
    for name, row in found.items():
        ours = sum((damage for way, damage in row.items() if way not in by_hand), Damage())
        cells = [in_words(row[way]) if way in row else "" for way in by_hand]
        lines.append(f"| {name} | {' | '.join(cells)} | {in_words(ours)} |")
    for name, row in found.items():
        tasks = next(iter(row.values())).tasks
        lines += ["", f"## {name}", "", f"{FAULTS[name].summary} About {tasks} tasks each.", ""]
        lines += ["| way | lost | wrong | leaked | stuck | needless | under |", "|---|--:|--:|--:|--:|--:|---|"]
        for way, damage in row.items():
            hurt = [r.cell.pool for r in results if (r.cell.fault, r.cell.way) == (name, way) and r.damage.any]
            values = " | ".join(str(getattr(damage, column) or "·") for column in COLUMNS)
            lines.append(f"| {way} | {values} | {', '.join(hurt) or '·'} |")
    if failed := [f"- {result.cell}: {result.failed.splitlines()[-1]}" for result in results if result.failed]:
        lines += ["", "## Not run", "", *failed]
    return "\n".join(lines) + "\n"


def several(known: Sequence[str]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return a click callback that takes names separated by commas."""

    def split(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
        chosen = [part.strip() for part in value.split(",")]
        for part in chosen:
            if part not in known:
                raise click.BadParameter(f"{part!r} is not known. Known: {', '.join(known)}.")
        return chosen

    return split


def service_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose the database server and the broker."""
    database = "A PostgreSQL server, or durable, durable+1ms and the like for one of our own; fast by default."
    command = click.option("--broker-url", envvar="BROKER_URL", help="An embedded Valkey by default.")(command)
    return click.option("--database-url", envvar="DATABASE_URL", help=database)(command)


@click.command()
@click.option("--pools", callback=several(POOLS), default="prefork,threads,gevent", show_default=True)
@click.option("--faults", callback=several(tuple(FAULTS)), default=",".join(FAULTS), help="Which ones; all by default.")
@click.option("--seed", default=SEED, show_default=True, help="Of the random moments.")
@click.option("--side-by-side", default=2, show_default=True, help="How many workers at one time.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory for faults.json and faults.md.")
@service_options
def faults(
    pools: list[str], faults: list[str], seed: int, side_by_side: int, out: Path | None, database_url: str | None,
    broker_url: str | None,
) -> None:  # fmt: skip
    """Cause faults for real, and count what they cost: our strategies beside patterns written by hand.

    Exits with 1 if celery-alchemy took any damage.
    """
    console = Console()
    chosen = list(runs.cells(pools, faults))
    with (
        run_directory() as run,
        database_server(run, database_url) as server,
        broker(run, broker_url) as the_broker,
        Progress(console=console) as progress,
    ):
        if server.url.get_backend_name() != "postgresql":
            raise click.UsageError("DATABASE_URL is no PostgreSQL server, whose sessions these faults look at.")
        bar = progress.add_task(f"{len(chosen)} cells", total=len(chosen))
        results = runs.run_all(
            run, server, the_broker, chosen, seed=seed, side_by_side=side_by_side,
            on_result=lambda result: progress.advance(bar),
        )  # fmt: skip
    print_table(console, results)
    if out is not None:
        command, labels = "celery " + shlex.join(sys.argv[1:]), (server.label, the_broker.label)
        runs.write(out / "faults.json", results, command=command, seed=seed, server=labels[0], broker=labels[1])
        about = [f"Database: {labels[0]}.", f"Broker: {labels[1]}.", f"Seed {seed}."]
        (out / "faults.md").write_text(markdown(results, command=command, about=about))
    if any(result.failed or result.damage.any for result in results if result.cell.pattern == OURS):
        sys.exit(1)
