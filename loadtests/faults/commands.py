"""`celery alchemy faults`: cause faults, and compare what they cost."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..services.harness import services
from ..tasks.patterns import OURS, POOLS
from . import runs
from .faults import FAULTS

SEED = 20261125


def print_table(console: Console, results: Sequence[runs.Result]) -> None:
    """Print the table, and which cells could not be run."""
    ways = list(dict.fromkeys(result.cell.way for result in results))
    table = Table("fault", *ways, title="Damage, over all worker pools", show_lines=True)
    for fault, row in runs.sums(results).items():
        table.add_row(fault, *(str(row.get(way, "")) for way in ways))
    console.print(table)
    for result in results:
        if result.failed:
            console.print(f"[red]not run[/red]: {result.cell}: {result.failed.splitlines()[-1]}")


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
    with services(database_url, broker_url) as found, Progress(console=console) as progress:
        if found.server.url.get_backend_name() != "postgresql":
            raise click.UsageError("DATABASE_URL is no PostgreSQL server, whose sessions these faults look at.")
        bar = progress.add_task(f"{len(chosen)} cells", total=len(chosen))
        results = runs.run_all(found, chosen, seed, side_by_side, lambda: progress.advance(bar))
        server, broker = found.server.label, found.broker.label
    print_table(console, results)
    if out is not None:
        command = "celery " + shlex.join(sys.argv[1:])
        about = [f"Database: {server}.", f"Broker: {broker}.", f"Seed {seed}."]
        out.mkdir(parents=True, exist_ok=True)
        (out / "faults.json").write_text(runs.facts(results, command=command, seed=seed, server=server, broker=broker))
        (out / "faults.md").write_text(runs.markdown(results, command=command, about=about))
    if any(result.failed or result.damage.any for result in results if result.cell.pattern == OURS):
        sys.exit(1)
