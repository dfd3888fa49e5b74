"""`celery alchemy faults`: cause every fault in every cell, a few cells at a time, and compare what they cost."""

from __future__ import annotations

import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import click

from ..bench import arguments
from ..bench.runs import command_line, console_of_run
from ..bench.store import machine, versions
from ..errors import WorkerError
from ..reports.tables import table
from ..reports.terminal import print_table
from ..services.harness import Services, services
from ..tasks.patterns import OURS, PATTERNS
from .place import FAULTS, Damage, place

SEED = 20261125
STRATEGIES = ("local", "scoped", "per_process")
BASELINES = ("recipe", "with_session", "thread_local", "flask", "tuned")
COLUMNS = [field.name for field in fields(Damage) if field.name != "tasks"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A way to give a task its Session, under a worker pool, and a fault."""

    pool: str
    pattern: str
    strategy: str  # Empty for a pattern written by hand
    fault: str

    @property
    def way(self) -> str:
        """The way's name, for people."""
        return f"{OURS} ({self.strategy})" if self.strategy else self.pattern

    def __str__(self) -> str:
        return f"{self.fault}, {self.pool}, {self.way}"


@dataclass(frozen=True, slots=True)
class Result:
    """What the fault cost there."""

    cell: Cell
    damage: Damage
    failed: str = ""  # Why the cell could not be run, for example that its worker did not start
    seconds: float = 0.0


def cells(pools: Sequence[str], faults: Sequence[str]) -> Iterator[Cell]:
    """Return the cells, the ones of one fault together."""
    for name in faults:
        for pool in pools:
            if pool in FAULTS[name].pools:
                yield from (Cell(pool, way, "", name) for way in BASELINES if pool in PATTERNS[way].pools)
                yield from (Cell(pool, OURS, strategy, name) for strategy in STRATEGIES)


def run_all(
    services: Services, chosen: Sequence[Cell], seed: int, side_by_side: int, on_result: Callable[[Result], object]
) -> list[Result]:
    """Run the cells, `side_by_side` at a time; return their results in the order of the cells."""
    with ThreadPoolExecutor(side_by_side) as executor:
        running = [executor.submit(_run, services, cell, seed) for cell in chosen]
        try:
            for ended in as_completed(running):
                on_result(ended.result())
        finally:
            executor.shutdown(cancel_futures=True)
    return [future.result() for future in running]


def _run(services: Services, cell: Cell, seed: int) -> Result:
    fault, begun = FAULTS[cell.fault], time.monotonic()

    def result(damage: Damage, failed: str = "") -> Result:
        return Result(cell, damage, failed, round(time.monotonic() - begun, 1))

    try:
        with place(services, cell.pool, cell.pattern, cell.strategy, in_main=fault.in_main) as here:
            fault.cause(here, random.Random(seed))  # noqa: S311 - nothing secret
            return result(here.damage())
    except WorkerError as error:
        return result(Damage(), str(error).splitlines()[0])
    except Exception:
        return result(Damage(), traceback.format_exc().strip())


def sums(results: Sequence[Result]) -> dict[str, dict[str, Damage]]:
    """Return the damage over all worker pools, by fault and way."""
    found: dict[str, dict[str, Damage]] = {}
    for result in results:
        row = found.setdefault(result.cell.fault, {})
        row[result.cell.way] = row.get(result.cell.way, Damage()) + result.damage
    return found


def markdown(results: Sequence[Result], *, command: str, about: Sequence[str]) -> str:
    """Return the page for the documentation: one table over all faults, ours in one column, then one for each fault."""
    from jinja2 import Environment, PackageLoader

    by_hand = list(dict.fromkeys(result.cell.way for result in results if result.cell.pattern != OURS))
    damaged = {(result.cell.fault, result.cell.way, result.cell.pool) for result in results if result.damage.any}
    pools = list(dict.fromkeys(result.cell.pool for result in results))
    # The page is Markdown, not HTML.
    environment = Environment(loader=PackageLoader(__package__, ""), trim_blocks=True, lstrip_blocks=True)  # noqa: S701
    return environment.get_template("faults.md.j2").render(
        command=command, about=" ".join(about), ours=OURS, by_hand=by_hand, pools=pools, columns=COLUMNS,
        faults=FAULTS, rows=sums(results), failed=[result for result in results if result.failed],
        together=lambda row: sum((damage for way, damage in row.items() if way not in by_hand), Damage()),
        hurt=lambda fault, way: [pool for pool in pools if (fault, way, pool) in damaged],
    )  # fmt: skip


@click.command()
@arguments.option("--pools", "prefork,threads,gevent", arguments.POOL.several, "Worker pools.")
@arguments.option("--faults", "all", arguments.OneOf("fault", FAULTS).several, "Which ones.")
@click.option("--seed", default=SEED, show_default=True, help="Of the random moments.")
@click.option("--side-by-side", default=4, show_default=True, help="Workers at one time: they mostly wait.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory for faults.json and faults.md.")
@arguments.DATABASE_URL
@arguments.BROKER_URL
def faults(
    pools: list[str], faults: list[str], seed: int, side_by_side: int, out: Path | None, database_url: str | None,
    broker_url: str | None,
) -> None:  # fmt: skip
    """Cause faults for real, and count what they cost: our strategies beside patterns written by hand.

    Exits with 1 if celery-alchemy took any damage.
    """
    console = console_of_run()
    chosen = list(cells(pools, faults))

    def told(one: Result) -> None:
        console.print(f"{one.seconds:6.1f} s  {one.cell}: {one.failed or one.damage}", markup=False, highlight=False)

    with services(database_url, broker_url) as found:
        assert found.server is not None
        if found.server.url.get_backend_name() != "postgresql":
            raise click.UsageError("DATABASE_URL is no PostgreSQL server, whose sessions these faults look at.")
        results = run_all(found, chosen, seed, side_by_side, told)
        server, broker = found.server.label, found.broker.label
    ways = list(dict.fromkeys(result.cell.way for result in results))
    rows = ([fault, *(str(row.get(way, "")) for way in ways)] for fault, row in sums(results).items())
    print_table(console, *table("Damage, over all worker pools", " | ".join(["fault", *ways]), rows))
    for result in results:
        if result.failed:
            console.print(f"[red]not run[/red]: {result.cell}: {result.failed.splitlines()[-1]}")
    if out is not None:
        command = command_line()
        about = [f"Database: {server}.", f"Broker: {broker}.", f"Seed {seed}."]
        out.mkdir(parents=True, exist_ok=True)
        facts = {
            "command": command, "seed": seed, "server": server, "broker": broker, "machine": machine(),
            "versions": versions(), "results": [asdict(result) for result in results],
        }  # fmt: skip
        (out / "faults.json").write_text(json.dumps(facts, indent=1) + "\n")
        (out / "faults.md").write_text(markdown(results, command=command, about=about))
    if any(result.failed or result.damage.any for result in results if result.cell.pattern == OURS):
        sys.exit(1)
