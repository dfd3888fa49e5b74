"""`celery alchemy faults`: cause faults, and compare what they cost."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from ..patterns import OURS
from ..rundir import run_directory
from ..services import broker, database_server
from . import report, runs
from .faults import ALL, FAULTS

SEED = 20261125


def _choice(known: tuple[str, ...]) -> click.ParamType[list[str]]:
    class Several(click.ParamType[list[str]]):
        name = ",".join(known)

        def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
            if isinstance(value, list):
                return value
            chosen = [part.strip() for part in str(value).split(",")]
            for part in chosen:
                if part not in known:
                    self.fail(f"{part!r} is not known. Known: {', '.join(known)}.", param, ctx)
            return chosen

    return Several()


@click.command()
@click.option("--pools", type=_choice(ALL), default="prefork,threads,gevent", show_default=True, help="Worker pools.")
@click.option(
    "--faults", type=_choice(tuple(FAULTS)), default=",".join(FAULTS), show_default=True, help="Which ones to cause."
)
@click.option("--seed", default=SEED, show_default=True, help="Of the random moments.")
@click.option("--side-by-side", default=2, show_default=True, help="How many workers at one time.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory for faults.json and faults.md.")
@click.option("--database-url", envvar="DATABASE_URL", help="A PostgreSQL server; an embedded one by default.")
@click.option("--broker-url", envvar="BROKER_URL", help="A broker; an embedded Valkey by default.")
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
        labels = (server.label, the_broker.label)
    report.print_table(console, results)
    if out is not None:
        command = "celery " + shlex.join(sys.argv[1:])
        runs.write(out / "faults.json", results, command=command, seed=seed, server=labels[0], broker=labels[1])
        about = [f"Database: {labels[0]}.", f"Broker: {labels[1]}.", f"Seed {seed}."]
        (out / "faults.md").write_text(report.markdown(results, command=command, about=about))
    if any(result.failed or result.damage.any for result in results if result.cell.pattern == OURS):
        sys.exit(1)
