"""One batch of a contest: all its workers up at once, a checked load for each, then slices in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from ..errors import LoadTestError
from ..percentiles import Percentiles
from ..rows import TaskRow
from ..sampler import Sampler
from .cells import Bench, RunningCell, phases
from .contests import Contest, orders
from .measure import CpuClock, spent
from .results import Arm, Batch, Cell, Slice

STARTERS = 4
"""Workers that start at the same time: each is busy importing for a second or two."""
CHECKED_S = 20.0
"""How long a checked load may take."""
TASKS_IN_A_ROW = 4
LONGEST_SLICE_S = 5.0
CHECKED_SLICE = 0
"""The slice that checked loads count as: it is in no ratio."""
WARM_UP_TASKS = 10
"""For each slot, in a batch after the first: every pool process connects, and psycopg prepares what it sends often."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How much load an arm gets in one batch."""

    rounds: int
    """Slices for each arm; 0 to check only."""
    slice_s: float
    ramp_s: float
    """Seconds at the begin of each slice that are not counted."""
    checked_tasks: int
    """Tasks for each pool process, thread or greenlet, of the load before the slices; a broken arm is out then."""
    users_per_slot: int
    """Closed model: tasks in flight for each pool process, thread or greenlet."""


def run_batch(
    bench: Bench,
    contest: Contest,
    number: int,
    options: BatchOptions,
    *,
    without: Collection[str],
    first_slice: int,
    progress: Progress,
) -> tuple[Batch, list[TaskRow]]:
    """Run one batch, and return what is kept of it, with a row for every task.

    Args:
        without: Names of the arms that were broken in an earlier batch: they are left out.
        first_slice: Number of the first slice; numbers are unique in a run.
    """
    _require_connections(bench, contest)
    begun, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    arms = [arm for arm in contest.arms if arm.name not in without]
    with running_cells(bench, contest.workload, arms, progress) as cells, sampler_of(bench, cells) as sampler:
        for cell in cells:
            progress(f"checking {cell.arm.name}")
            # What the check finds, it finds in the first batch; later ones are checked by what their slices leave.
            checked_load(cell, options, options.checked_tasks if number == 1 else WARM_UP_TASKS)
            with sampler.paused() if sampler else nullcontext():
                cell.check(None, None)
            if cell.out:
                cell.abandon()
        options = replace(options, slice_s=slice_length(cells, options.slice_s))
        slices: list[Slice] = []
        seed = f"{contest.name}/{number}"
        for turn, order in enumerate(orders(arms, options.rounds, seed), start=1):
            progress(f"round {turn} of {options.rounds}")
            by_arm = {cell.arm: cell for cell in cells}
            for position, arm in enumerate(order):
                if not by_arm[arm].out:
                    where = (first_slice + len(slices), turn, position)
                    slices.append(run_slice(bench, by_arm[arm], options, *where))
                    if by_arm[arm].out:
                        by_arm[arm].abandon()
        progress("checking and stopping the workers")
        finished = finish(cells, sampler, at_once=number > 1)
    rows = [row for cell in cells for row in cell.rows]
    batch = Batch(
        contest=contest.name,
        number=number,
        workload=contest.workload,
        reference=contest.reference.name,
        cells=finished,
        slices=slices,
        begun=begun,
        seconds=round(time.monotonic() - clock, 1),
    )
    return batch, rows


def _require_connections(bench: Bench, contest: Contest) -> None:
    """Refuse a contest whose workers, all up at once, cannot all connect: they would look broken."""
    # One for each task that runs, and one for whoever looks: ours, and the server's own.
    needed = sum(arm.concurrency + 1 for arm in contest.arms) + 10
    if bench.server and not bench.user_task and needed > bench.server.max_connections:
        raise LoadTestError(
            f"{contest.name} has {len(contest.arms)} workers, which need about {needed} connections at once; the "
            f"database server accepts {bench.server.max_connections}. Lower --concurrency, compare fewer patterns, or "
            f"raise max_connections."
        )


@contextmanager
def running_cells(
    bench: Bench, workload: str, arms: Sequence[Arm], progress: Progress = lambda _: None
) -> Iterator[list[RunningCell]]:
    """Start a cell for each arm, several at a time, and close them all when the block ends."""
    cells = [RunningCell(bench, arm, workload) for arm in arms]
    bench.generator.forget_rows()
    progress(f"starting {len(cells)} workers")
    with ThreadPoolExecutor(STARTERS) as threads:
        try:
            _all(threads, cells, RunningCell.start)
            for cell in cells:
                cell.connect()
            yield cells
            for cell in cells:
                cell.disconnect()
        finally:
            _all(threads, cells, RunningCell.close)


def _all(threads: ThreadPoolExecutor, cells: Sequence[RunningCell], step: Callable[[RunningCell], None]) -> None:
    """Take a step with every cell; only then raise what one of them raised."""
    steps = [threads.submit(step, cell) for cell in cells]
    errors = [error for future in steps if (error := future.exception())]
    if errors:
        raise errors[0]


@contextmanager
def sampler_of(bench: Bench, cells: Sequence[RunningCell]) -> Iterator[Sampler | None]:
    databases = sorted({str(cell.database.database) for cell in cells if cell.database})
    with ExitStack() as stack:
        yield stack.enter_context(Sampler(bench.server.url, databases)) if bench.server and databases else None


def checked_load(cell: RunningCell, options: BatchOptions, tasks_per_slot: int) -> None:
    """Send a fixed number of tasks, which also warms every pool process up."""
    if not cell.out:
        cell.load(
            number=CHECKED_SLICE,
            within_s=CHECKED_S,
            tasks=tasks_per_slot * cell.arm.concurrency,
            users=options.users_per_slot * cell.arm.concurrency,
        )


def slice_length(cells: Sequence[RunningCell], wanted_s: float) -> float:
    """Return how long the slices of a contest are: long enough for several tasks of its slowest arm in a row.

    A slice counts what ends within it; tasks that take as long as it would hardly ever be counted.
    """
    slowest_ms = max(
        (found["latency"].p50 for cell in cells if (found := phases(cell.rows)) and not cell.out), default=0
    )
    return max(wanted_s, min(TASKS_IN_A_ROW * slowest_ms / 1000, LONGEST_SLICE_S))


def run_slice(bench: Bench, cell: RunningCell, options: BatchOptions, number: int, turn: int, position: int) -> Slice:
    """Put one arm under load for a slice, and measure what it cost."""
    database_pid = bench.server.pid if bench.server else None
    begin, started = CpuClock.read(), time.monotonic()
    answer = cell.load(
        number=number,
        within_s=options.slice_s + options.ramp_s,
        seconds=options.slice_s,
        ramp_s=options.ramp_s,
        users=options.users_per_slot * cell.arm.concurrency,
    )
    wall_s = time.monotonic() - started
    cost = spent(begin, CpuClock.read(), wall_s, cell.worker_pid, database_pid)
    low, high = answer["window"]
    return Slice(
        number=number,
        round=turn,
        position=position,
        arm=cell.arm.name,
        seconds=round(high - low, 6),
        succeeded=answer["succeeded"],
        failed=answer["failed"],
        unanswered=answer["unanswered"],
        tasks=answer["tasks"],
        latency=_percentiles(answer["latency_ms"]),
        worker_cpu_s=round(cost.worker_s, 3),
        database_cpu_s=None if cost.database_s is None else round(cost.database_s, 3),
        generator_cpu_s=round(answer["cpu_s"], 3),
        foreign_cpus=round(cost.foreign_cpus, 3),
        wall_s=round(wall_s, 3),
        send_lag_p99_ms=answer["send_lag_p99_ms"],
    )


def finish(cells: Sequence[RunningCell], sampler: Sampler | None, *, at_once: bool = False) -> list[Cell]:
    """Check and stop all cells at the same time.

    Args:
        at_once: Kill the workers, when an earlier batch has seen how they stop.
    """

    def one(cell: RunningCell) -> Cell:
        peak = sampler.peaks.get(str(cell.database.database)) if sampler and cell.database else None
        return cell.finish(peak, sampler.error if sampler else None, at_once=at_once)

    for cell in () if at_once else cells:
        # All while all still run: they share pages, and each counts its share.
        cell.measure_memory()
    # Stopping is mostly waiting.
    with ThreadPoolExecutor(max(1, len(cells))) as threads:
        return list(threads.map(one, cells))


def _percentiles(fields: dict[str, Any] | None) -> Percentiles | None:
    return Percentiles(**fields) if fields else None
