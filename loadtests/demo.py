"""`make demo`: every worker pool, real workers, real transactions, one table."""

from __future__ import annotations

import difflib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .cells import Bench, CellOptions, CellResult, run_cell
from .errors import LoadTestError
from .report import print_report, write_report
from .rundir import run_directory
from .services import broker, database_server
from .worker import POOLS

WIDTH = 100
"""Columns, where the output is no terminal that knows its own width."""


def _suggest(value: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    return (f"Did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(known)}."


def parse_pools(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    """Return the worker pools to run.

    Raises:
        click.BadParameter: One is unknown, or its package is not installed.
    """
    pools = list(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    if not pools:
        raise click.BadParameter(f"names no worker pool. Known: {', '.join(POOLS)}.")
    for pool in pools:
        if pool not in POOLS:
            raise click.BadParameter(f"{pool!r} is not a worker pool. {_suggest(pool, POOLS)}")
        if pool in {"gevent", "eventlet"} and find_spec(pool) is None:
            raise click.BadParameter(f"{pool} is not installed: pip install 'celery-alchemy[{pool}]'.")
    return pools


def parse_strategy(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Return the strategy to insist on: a registered name, or `package.module:Class`.

    Raises:
        click.BadParameter: No strategy is registered under this name, or it cannot be imported.
    """
    known = ["auto", *sorted(point.name for point in entry_points(group="celery_alchemy.strategies"))]
    if value is None or value in known:
        return value
    module, colon, name = value.partition(":")
    if not colon:
        raise click.BadParameter(f"{value!r} is not a session strategy. {_suggest(value, known)}")
    try:
        getattr(import_module(module), name)
    except Exception as error:
        raise click.BadParameter(f"{value!r} cannot be imported: {type(error).__name__}: {error}") from error
    return value


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--pools", default=",".join(POOLS), callback=parse_pools, help="Worker pools, separated by commas.")
@click.option("--strategy", callback=parse_strategy, help="Session strategy; left to the worker by default.")
@click.option("--tasks", default=400, type=click.IntRange(1, 100_000), help="Transfers for each worker pool, at most.")
@click.option("--concurrency", default=4, type=click.IntRange(1, 64), help="Pool processes, threads or greenlets.")
@click.option(
    "--report",
    "directory",
    default="report",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to write demo.html and demo.json.",
)
def main(pools: list[str], strategy: str | None, tasks: int, concurrency: int, directory: Path) -> None:
    """Run money transfers under each worker pool and check that nothing is lost.

    Uses DATABASE_URL and BROKER_URL where they are set, and otherwise a PostgreSQL and a Valkey of its own.
    """
    console = Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else WIDTH)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    cells = [CellOptions(pool, concurrency, tasks, strategy) for pool in pools]
    try:
        results, services = _run(console, cells)
    except LoadTestError as error:
        console.print("[bold red]The demo cannot run.[/]", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("Stopped: the workers and servers of this run are gone.")
        sys.exit(128 + signal.SIGINT)
    print_report(console, results)
    command = shlex.join(["python", "-m", "celery_alchemy.loadtests.demo", *sys.argv[1:]])
    for path in write_report(directory, results, services, command):
        console.print(f"Written: {path}", highlight=False)
    sys.exit(1 if any(result.broken for result in results) else 0)


def _leave(number: int, _frame: FrameType | None) -> None:
    """Unwind as Ctrl-C does, so that every server and worker is stopped on the way out."""
    sys.exit(128 + number)


def _run(console: Console, cells: Sequence[CellOptions]) -> tuple[list[CellResult], list[str]]:
    results: list[CellResult] = []
    with ExitStack() as stack:
        run = stack.enter_context(run_directory())
        server = stack.enter_context(database_server(run, os.environ.get("DATABASE_URL")))
        queue = stack.enter_context(broker(run, os.environ.get("BROKER_URL")))
        console.print(f"{server.label}, {queue.label}", highlight=False)
        progress = stack.enter_context(
            Progress(
                SpinnerColumn(),
                TextColumn("{task.description:9}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[stage]}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
        )
        for cell in cells:
            bar = progress.add_task(cell.pool, total=cell.tasks, stage="")
            result = run_cell(
                Bench(run, server, queue),
                cell,
                lambda stage, ended, bar=bar: progress.update(bar, stage=stage, completed=ended),  # type: ignore[misc]
            )
            progress.remove_task(bar)
            console.print(_line(result), highlight=False)
            results.append(result)
        return results, [server.label, queue.label]


def _line(result: CellResult) -> str:
    verdict = "[bold red]BROKEN[/]" if result.broken else "[green]ok[/]"
    if not result.strategy:
        return f"{result.options.pool:9} {verdict}: the worker did not start"
    return (
        f"{result.options.pool:9} {verdict}: ready after {result.start_s:.1f} s, {result.sent} transfers in "
        f"{result.load_s:.1f} s, strategy {result.strategy}"
    )


if __name__ == "__main__":
    main()
