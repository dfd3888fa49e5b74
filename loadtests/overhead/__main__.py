"""What the layer costs per task, beside the same task written by hand: `make bench-overhead`.

Instructions that the client executes are counted by valgrind's callgrind, where it is installed: the same on a busy
machine. CPU time (user and system) is measured in rounds of several processes: each round runs a pair of tasks in turn
and compares the two as a ratio. The layer is compared with itself too, which shows what is noise. Tasks run through
Celery's own tracer, in a process that acts as one of a worker pool.
"""

from __future__ import annotations

import statistics
from operator import sub, truediv

import click
from rich.console import Console

from ..bench.runs import console_of_run
from ..bench.store import machine, versions
from ..reports.statistics import Estimate, Groups, estimate
from ..reports.tables import table
from ..reports.terminal import print_table
from . import callgrind, child, counts
from .processes import database, started
from .rows import BY_HAND, OUTBOXES, PREFORK_RATIO, ROWS, SIDES, WITH_LAYER, Row

WARM_UP_TASKS = 300
POOLS = (*child.WORKER_POOLS, counts.AWAITED_CELL[0])
TIMED = (BY_HAND, WITH_LAYER, "with the layer, again")


def limit_of(row: Row, pool: str) -> float | None:
    """Return how many times the instructions by hand it may be."""
    return PREFORK_RATIO if pool == "prefork" and row.ratio == 1.0 else row.ratio


def rows_of(cell: counts.Cell, rows: list[Row]) -> list[Row]:
    """Return those of `rows` that there are in a cell."""
    return [row for row in rows if cell != counts.AWAITED_CELL or row.name in counts.AWAITED_ROWS]


def print_instructions(console: Console, url: str, cells: list[counts.Cell], rows: list[Row]) -> None:
    """Count and print."""
    tables: dict[str, list[list[str]]] = {}
    wanted = {cell: tuple(row.name for row in rows_of(cell, rows)) for cell in cells}
    for _, where, row, ours, hand in counts.instructions(url, wanted):
        added, ratio = ours.median - hand.median, ours.median / hand.median
        tables.setdefault(where, []).append([
            row.name, f"{hand.median:,.0f}", f"{ours.median:,.0f}", f"{added:+,.0f}", f"{ratio:.3f}",
            f"{max(hand.spread, ours.spread):.2%}", compared(row, where.split(",")[0], added, ratio),
        ])  # fmt: skip
    columns = "task | by hand | with layer | added | ratio | spread | target"
    for where, lines in tables.items():
        print_table(console, *table(f"Instructions per task, acting as {where}", columns, lines))


def compared(row: Row, pool: str, added: float, ratio: float) -> str:
    """Return the target of a row's instructions, and whether it is met; "" where it has none."""
    limit = limit_of(row, pool)
    if pool == counts.AWAITED_CELL[0]:
        return ""
    if row.added is not None:
        return f"{row.added:+,} {'met' if added <= row.added else 'missed'}"
    return "" if limit is None else f"{limit:.2f} {'met' if ratio <= limit else 'missed'}"


def print_outbox(console: Console, url: str, cells: list[counts.Cell]) -> None:
    """Count what one message costs: sent by hand after the COMMIT, with the layer, and with each kind of outbox."""
    for pool, strategy in (cell for cell in cells if cell != counts.AWAITED_CELL):
        by_hand, lines = None, []
        for side in (*SIDES, *OUTBOXES):
            acting_as = counts.BY_HAND_LIKE.get(pool, pool)
            counted = callgrind.count(side, acting_as, strategy, url, ["on_commit"])["on_commit"]
            by_hand = by_hand or counted
            added, ratio = counted.median - by_hand.median, counted.median / by_hand.median
            lines.append([side, f"{counted.median:,.0f}", f"{added:+,.0f}", f"{ratio:.3f}", f"{counted.spread:.2%}"])
        title = f"Instructions of an INSERT and one message, acting as {pool}, strategy {strategy}"
        print_table(console, *table(title, "side | instructions | added | ratio | spread", lines))


def time_row(pool: str, strategy: str, url: str, row: Row, restarts: int, rounds: int, tasks: int) -> list[Groups]:
    """Return CPU time in microseconds per task, in processes of their own, for those differ by more than rounds do.

    Returns:
        By side (by hand, with the layer, the layer again): of each process its rounds.
    """
    found = []
    for number in range(restarts):
        order = TIMED if number % 2 else TIMED[::-1]  # what is made first lies elsewhere in memory
        with started(pool, strategy, url, *order, seed=number) as process:
            tasks_of = {side: row.by_hand if side == BY_HAND else row.with_layer for side in order}
            for side, task in tasks_of.items():
                process.call(child.repeat, side, task, WARM_UP_TASKS)
            columns = zip(*process.call(child.time_rounds, tasks_of, rounds, tasks), strict=True)
            times = dict(zip(order, columns, strict=True))
            found.append([times[side] for side in TIMED])
    return list(zip(*found, strict=True))


def ratios(ours: Groups, theirs: Groups) -> Estimate:
    """Return one side divided by the other, round by round."""
    return estimate([list(map(truediv, *pair)) for pair in zip(ours, theirs, strict=True)])


def print_times(
    console: Console, url: str, cells: list[counts.Cell], rows: list[Row], restarts: int, rounds: int, tasks: int
) -> None:
    """Measure and print; one process at a time, for two would be in each other's way."""
    columns = "task | by hand us | with layer us | added us | ratio | 95 % | the layer by itself, 95 % | target"
    for pool, strategy in cells:
        lines = []
        for row in rows_of((pool, strategy), rows):
            hand, ours, again = time_row(pool, strategy, url, row, restarts, rounds, tasks)
            ratio, same = ratios(ours, hand), ratios(again, ours)
            added = sorted(statistics.median(map(sub, *pair)) for pair in zip(ours, hand, strict=True))
            target, wanted = "", row.cpu_ratio or limit_of(row, pool)
            if row.added_us is not None:
                target = f"{row.added_us:+.1f} us {'met' if least(added) <= row.added_us else 'missed'}"
            elif wanted is not None:
                target = f"{wanted:.2f} {'met' if (ratio.low or ratio.middle) <= wanted else 'missed'}"
            medians = [f"{statistics.median(map(statistics.median, side)):.1f}" for side in (hand, ours)]
            lines.append([
                row.name, *medians, f"{statistics.median(added):+.1f}", f"{ratio.middle:.3f}", between(ratio),
                between(same), target,
            ])  # fmt: skip
        title = f"CPU time per task, acting as {pool}, strategy {strategy}; {restarts} processes x {rounds} x {tasks}"
        print_table(console, *table(title, columns, lines))


def least(ordered: list[float]) -> float:
    """Return the lower end of the 95 % sign-test interval of the median of `ordered` values."""
    return ordered[max(0, int(len(ordered) / 2 - 0.98 * len(ordered) ** 0.5))]


def between(ratio: Estimate) -> str:
    """Return the interval of a ratio."""
    return "too few" if ratio.low is None else f"{ratio.low:.3f} to {ratio.high:.3f}"


@click.command(help=__doc__)
@click.option("--restarts", default=10, show_default=True, type=click.IntRange(1), help="Processes per pair.")
@click.option("--rounds", default=12, show_default=True, type=click.IntRange(2), help="Rounds per process.")
@click.option("--tasks", default=100, show_default=True, type=click.IntRange(1), help="Tasks per side and round.")
@click.option("--strategy", "strategies", multiple=True, type=click.Choice(counts.STRATEGIES), help="Default: all.")
@click.option("--pool", "pools", multiple=True, type=click.Choice(POOLS), help="To act as; default: all.")
@click.option("--row", "names", multiple=True, type=click.Choice([row.name for row in ROWS]), help="Default: all.")
@click.option("--only", type=click.Choice(["instructions", "times", "outbox"]), help="Default: all.")
@click.option("--url", help="Of a database to use as it is; default: DATABASE_URL, else an embedded PostgreSQL.")
def main(
    restarts: int, rounds: int, tasks: int, strategies: tuple[str, ...], pools: tuple[str, ...], names: tuple[str, ...],
    only: str | None, url: str | None,
) -> None:  # fmt: skip
    """Measure and print the tables."""
    chosen = set(pools or POOLS)
    ordinary = [pool for pool in child.WORKER_POOLS if pool in chosen]
    cells = [(pool, strategy) for pool in ordinary for strategy in strategies or counts.STRATEGIES]
    cells += [counts.AWAITED_CELL] if counts.AWAITED_CELL[0] in chosen and not strategies else []
    rows = [row for row in ROWS if not names or row.name in names]
    console = console_of_run()
    with database(url) as place:
        if only != "times" and not callgrind.is_available():
            console.print("valgrind is not installed: no instructions are counted.")
        elif only != "times":
            if only != "outbox":
                print_instructions(console, place, cells, rows)
            if only != "instructions":
                print_outbox(console, place, cells)
        if only in {None, "times"}:
            print_times(console, place, cells, rows, restarts, rounds, tasks)
    console.print(", ".join(f"{name} {value}" for name, value in {**machine(), **versions()}.items()))


if __name__ == "__main__":
    main()
