"""What a task costs, counted, and compared with what was committed: `make counts`.

Python counts calls and blocks of memory, valgrind instructions (where it is installed), a proxy round trips, and a
reader's walk is counted too. Nothing is timed, so a busy machine finds the same. What is more than 2 % above the
baseline fails.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click
from sqlalchemy import make_url

from ..services.proxy import CountingProxy
from . import baseline, callgrind, child, processes, walk
from .baseline import Count
from .rows import AWAITED, BY_HAND, ROWS, WITH_LAYER, Row

ROW = {row.name: row for row in ROWS}
STRATEGIES = ("local", "scoped", "per_process")
Cell = tuple[str, str]
Cells = dict[Cell, tuple[str, ...]]  # Names of rows, by worker pool and strategy
#: Threads by hand are solo by hand.
BY_HAND_LIKE = {"threads": "solo"}
TALLY_CELLS: tuple[Cell, ...] = tuple((pool, strategy) for pool in child.WORKER_POOLS for strategy in STRATEGIES)
#: Tasks that are `async def`, and those rows that there are of them. Elsewhere than under asyncio they wait for another
#: thread, which is another count each time.
AWAITED_CELL: Cell = ("asyncio", AWAITED)
AWAITED_ROWS = ("no database", "one SELECT")
WARM_UP_TASKS = 30
TALLIED_TASKS = 9
OTHER_SEEDS = (3, 4, 5, 6, 7)
#: Under valgrind a task takes fifty times as long: all rows once, elsewhere those that differ.
INSTRUCTION_CELLS: Cells = {
    ("solo", "local"): tuple(ROW),
    ("prefork", "per_process"): ("no database", "one SELECT", "one INSERT"),
    ("gevent", "scoped"): ("one SELECT",),
    ("threads", "scoped"): ("one SELECT",),
    AWAITED_CELL: AWAITED_ROWS,
}
ROUND_TRIP_ROWS = (
    *("one SELECT", "one INSERT", "ten statements", "one SELECT, read_only"),
    *("one INSERT, exactly once first", "one INSERT, exactly once last"),
)
ROUND_TRIP_TASKS = 10
#: Takes a side, a worker pool, a strategy and tasks; returns by kind of count and by task.
Measure = Callable[[str, str, str, list[str]], dict[str, dict[str, Any]]]


def measure_in_cells(cells: Cells, measure: Measure) -> Iterator[tuple[str, str, Row, Any, Any]]:
    """Yield of each row of each cell: kind of count, cell, row, and what was measured with the layer and by hand."""
    by_hand: dict[str, list[str]] = {}
    for (pool, _), names in cells.items():
        by_hand.setdefault(BY_HAND_LIKE.get(pool, pool), []).extend(ROW[name].by_hand for name in names)
    auto = {AWAITED_CELL[0]: AWAITED}
    jobs = [(BY_HAND, pool, auto.get(pool, "auto"), list(dict.fromkeys(tasks))) for pool, tasks in by_hand.items()]
    jobs += [(WITH_LAYER, *cell, [ROW[name].with_layer for name in names]) for cell, names in cells.items()]
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        found = list(executor.map(lambda job: measure(*job), jobs))
    hand = dict(zip(by_hand, found, strict=False))
    for ((pool, strategy), names), ours in zip(cells.items(), found[len(by_hand) :], strict=True):
        theirs = hand[BY_HAND_LIKE.get(pool, pool)]
        for kind in ours:
            for row in (ROW[name] for name in names):
                yield kind, f"{pool}, {strategy}", row, ours[kind][row.with_layer], theirs[kind][row.by_hand]


def tallies(url: str, cells: Iterable[Cell], rows: Iterable[Row]) -> list[Count]:
    """Count calls and blocks."""

    def measure(side: str, pool: str, strategy: str, tasks: list[str]) -> dict[str, dict[str, float]]:
        found = {}
        with processes.started(pool, strategy, url, side) as process:
            for task in tasks:
                process.call(child.repeat, side, task, WARM_UP_TASKS)
                found[task] = process.call(child.tally, side, task, TALLIED_TASKS)
        return {kind: {task: found[task][kind] for task in tasks} for kind in ("calls", "blocks")}

    measured = measure_in_cells(dict.fromkeys(cells, tuple(row.name for row in rows)), measure)
    return [Count(kind, where, row.name, ours, theirs) for kind, where, row, ours, theirs in measured]


def instructions(
    url: str, cells: Cells | None = None, seeds: tuple[int, ...] = callgrind.SEEDS
) -> Iterator[tuple[str, str, Row, callgrind.Instructions, callgrind.Instructions]]:
    """Count instructions, of `INSTRUCTION_CELLS` or of the rows in `cells`; as `measure_in_cells`."""

    def measure(side: str, pool: str, strategy: str, tasks: list[str]) -> dict[str, dict[str, callgrind.Instructions]]:
        return {"instructions": callgrind.count(side, pool, strategy, url, tasks, seeds)}

    return measure_in_cells(INSTRUCTION_CELLS if cells is None else cells, measure)


def least_instructions(url: str, above: Iterable[Count] | None = None) -> list[Count]:
    """Return the instructions of `INSTRUCTION_CELLS`.

    Args:
        above: Count only these again, which are above their baseline, with more seeds: the caches may have collided.
    """
    before = {(one.where, one.row): one for one in above or ()}
    cells: Cells = {}
    for where, name in before:
        pool, strategy = where.split(", ")
        cells[pool, strategy] = (*cells.get((pool, strategy), ()), name)
    found = []
    for kind, where, row, ours, theirs in instructions(url, *((cells, OTHER_SEEDS) if before else ())):
        one = before.get((where, row.name))
        known = (one.with_layer, one.by_hand) if one else (math.inf, math.inf)
        found.append(Count(kind, where, row.name, min(ours.least, known[0]), min(theirs.least, known[1])))
    return found


def round_trips(url: str) -> list[Count]:
    """Count round trips to the database."""
    counts = []
    with CountingProxy(make_url(url)) as proxy:
        through = proxy.url.render_as_string(hide_password=False)
        with processes.started("solo", "local", through, WITH_LAYER) as process:
            for name in ROUND_TRIP_ROWS:
                process.call(child.repeat, WITH_LAYER, ROW[name].with_layer, ROUND_TRIP_TASKS)  # warms up
                before = proxy.round_trips
                process.call(child.repeat, WITH_LAYER, ROW[name].with_layer, ROUND_TRIP_TASKS)
                per_task = (proxy.round_trips - before) / ROUND_TRIP_TASKS
                counts.append(Count("round trips", "solo, local", name, per_task))
    return counts


def walks(url: str) -> list[Count]:
    """Count what a reader walks through who follows a request."""
    with processes.started("solo", "auto", url, WITH_LAYER) as process:
        found = process.call(walk.record_requests)
    return [
        Count(f"walk: {name}", "solo, auto", scene, number)
        for scene, steps in found.items()
        for name, number in zip(walk.Walk._fields, walk.measure(steps), strict=True)
    ]


@click.command(help=__doc__)
@click.option("--url", help="Of a database to use as it is; default: DATABASE_URL, else an embedded PostgreSQL.")
@click.option("--write", is_flag=True, help="Let what is counted be the baseline of this Python.")
@click.option("--no-instructions", is_flag=True, help="Leave out what valgrind counts.")
def main(url: str | None, write: bool, no_instructions: bool) -> None:
    """Count, and compare or write."""
    with processes.database(url) as place:
        counts = [*tallies(place, TALLY_CELLS, ROWS), *round_trips(place), *walks(place)]
        # What it calls to wait for an answer depends on when that comes.
        counts += tallies(place, [AWAITED_CELL], [ROW["no database"]])
        if callgrind.is_available() and not no_instructions:
            counts += least_instructions(place)
        known = baseline.read()
        if known is not None and not write:
            above = [one.count for one in baseline.regressions(counts, known) if one.count.kind == "instructions"]
            if above:
                counts = [one for one in counts if one not in above] + least_instructions(place, above)
    if write:
        baseline.write(counts)
        click.echo(f"{len(counts)} counts are the baseline of Python {baseline.key()} now.")
        return
    if known is None:
        click.echo(f"Nothing was committed for Python {baseline.key()}: run make counts-baseline with it.")
        return
    new = baseline.unknown(counts, known)
    for count in new:
        click.echo(f"{count.kind}, {count.where}, {count.row}: {count}; there is no baseline", err=True)
    regressions = baseline.regressions(counts, known)
    for regression in regressions:
        click.echo(str(regression), err=True)
    click.echo(f"{len(counts)} counts, {len(regressions)} above the baseline, {len(new)} without one.")
    sys.exit(bool(regressions or new))


if __name__ == "__main__":
    main()
