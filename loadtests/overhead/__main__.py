"""What the layer costs per task, beside the same task written by hand: `make bench-overhead`.

Instructions that the client executes are counted by valgrind's callgrind, where it is installed: the same on a busy
machine. CPU time (user and system) is measured in rounds, each runs a pair of tasks in turn and compares the two as a
ratio. Tasks run through Celery's own tracer, in a process that acts as one of a worker pool.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import click
from rich.console import Console
from rich.table import Table

from . import callgrind, child, processes
from .acting import WORKER_POOLS
from .place import database
from .rows import BY_HAND, PREFORK_RATIO, ROWS, SIDES, WITH_LAYER, Row

STRATEGIES = ("local", "scoped", "per_process")
#: Threads by hand are solo by hand.
BY_HAND_LIKE = {"threads": "solo"}

Counts = dict[str, callgrind.Instructions]
Cell = tuple[str, str]


def count_instructions(url: str, cells: list[Cell], rows: list[Row]) -> tuple[dict[str, Counts], dict[Cell, Counts]]:
    """Return what each task takes by hand, by worker pool, and with the layer, by worker pool and strategy."""
    pools = list(dict.fromkeys(BY_HAND_LIKE.get(pool, pool) for pool, _ in cells))
    jobs = [(BY_HAND, pool, "auto") for pool in pools] + [(WITH_LAYER, *cell) for cell in cells]

    def count(job: tuple[str, str, str]) -> Counts:
        side, pool, strategy = job
        tasks = dict.fromkeys(row.by_hand if side == BY_HAND else row.with_layer for row in rows)
        return callgrind.count(side, pool, strategy, url, list(tasks))

    with ThreadPoolExecutor(os.cpu_count()) as executor:
        found = list(executor.map(count, jobs))
    by_hand = dict(zip(pools, found, strict=False))
    return by_hand, dict(zip(cells, found[len(pools) :], strict=True))


def print_instructions(console: Console, url: str, cells: list[Cell], rows: list[Row]) -> None:
    """Count and print."""
    by_hand, with_layer = count_instructions(url, cells, rows)
    for (pool, strategy), counts in with_layer.items():
        table = Table(title=f"Instructions per task, acting as {pool}, strategy {strategy}")
        for heading in ("task", "by hand", "with layer", "added", "ratio", "spread", "target"):
            table.add_column(heading, justify="left" if heading == "task" else "right")
        for row in rows:
            hand, ours = by_hand[BY_HAND_LIKE.get(pool, pool)][row.by_hand], counts[row.with_layer]
            added = ours.median - hand.median
            ratio = ours.median / hand.median
            limit = PREFORK_RATIO if pool == "prefork" and row.ratio == 1.0 else row.ratio
            met = added <= row.added if row.added is not None else limit is not None and ratio <= limit
            target = f"{row.added:+,}" if row.added is not None else f"{limit:.2f}"
            table.add_row(
                row.name,
                f"{hand.median:,.0f}",
                f"{ours.median:,.0f}",
                f"{added:+,.0f}",
                f"{ratio:.3f}",
                f"{max(hand.spread, ours.spread):.2%}",
                f"{target} {'met' if met else 'missed'}",
            )
        console.print(table)


def print_times(console: Console, url: str, cells: list[Cell], rows: list[Row], rounds: int, tasks: int) -> None:
    """Measure and print; one process at a time, for two would be in each other's way."""
    pairs = tuple((row.by_hand, row.with_layer) for row in rows)
    for pool, strategy in cells:
        outcomes = processes.run(child.Job(child.TIMES, pool, strategy, url, SIDES, pairs, (tasks,) * rounds))
        table = Table(title=f"CPU time per task, interleaved, acting as {pool}, strategy {strategy}")
        for heading in (
            "task",
            "by hand us",
            "with layer us",
            "added us",
            "ratio",
            "95 % of the median",
            "n",
            "target",
        ):
            table.add_column(heading, justify="left" if heading == "task" else "right")
        for row, times in zip(rows, outcomes, strict=True):
            ratios = sorted(ours / hand for hand, ours in times)
            low, high = median_interval(ratios)
            added = sorted(ours - hand for hand, ours in times)
            wanted = row.cpu_ratio or (PREFORK_RATIO if pool == "prefork" and row.ratio == 1.0 else row.ratio)
            target = ""
            if row.added_us is not None:
                target = f"{row.added_us:+.1f} us {'met' if median_interval(added)[0] <= row.added_us else 'missed'}"
            elif wanted is not None:
                target = f"{wanted:.2f} {'met' if low <= wanted else 'missed'}"
            table.add_row(
                row.name,
                f"{statistics.median(hand for hand, _ in times):.1f}",
                f"{statistics.median(ours for _, ours in times):.1f}",
                f"{statistics.median(added):+.1f}",
                f"{statistics.median(ratios):.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{rounds} x {tasks}",
                target,
            )
        console.print(table)


def median_interval(ordered: list[float]) -> tuple[float, float]:
    """Return the 95 % sign-test interval of the median of `ordered` values."""
    count = len(ordered)
    low = max(0, int(count / 2 - 0.98 * count**0.5))
    return ordered[low], ordered[count - 1 - low]


def hardware() -> str:
    """Name the processor and the versions that a number depends on."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("celery", "sqlalchemy", "psycopg", "celery-alchemy"))
    return f"Python {platform.python_version()}, {packages}; {os.cpu_count()} processors, {platform.machine()}."


@click.command(help=__doc__)
@click.option("--rounds", default=60, show_default=True, type=click.IntRange(6), help="Rounds per pair.")
@click.option("--tasks", default=100, show_default=True, type=click.IntRange(1), help="Tasks per side and round.")
@click.option("--strategy", "strategies", multiple=True, type=click.Choice(STRATEGIES), help="Default: all.")
@click.option("--pool", "pools", multiple=True, type=click.Choice(WORKER_POOLS), help="To act as; default: all.")
@click.option("--row", "names", multiple=True, type=click.Choice([row.name for row in ROWS]), help="Default: all.")
@click.option("--only", type=click.Choice(["instructions", "times"]), help="Default: both.")
@click.option("--url", help="Of a database to use as it is; default: DATABASE_URL, else an embedded PostgreSQL.")
def main(
    rounds: int,
    tasks: int,
    strategies: tuple[str, ...],
    pools: tuple[str, ...],
    names: tuple[str, ...],
    only: str | None,
    url: str | None,
) -> None:
    """Measure and print the tables."""
    cells = [(pool, strategy) for pool in pools or WORKER_POOLS for strategy in strategies or STRATEGIES]
    rows = [row for row in ROWS if not names or row.name in names]
    console = Console(width=None if sys.stdout.isatty() else 130)
    with database(url) as place:
        if only != "times":
            if callgrind.is_available():
                print_instructions(console, place, cells, rows)
            else:
                console.print("valgrind is not installed: no instructions are counted.")
        if only != "instructions":
            print_times(console, place, cells, rows, rounds, tasks)
    console.print(hardware())


if __name__ == "__main__":
    main()
