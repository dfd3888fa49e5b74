"""All workers of a contest up at once: a checked load for each, then slices in turns, or rising open loads."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from ..errors import LoadTestError
from ..services.sampler import Sampler
from ..tasks.patterns import ASYNCIO, TUNED_CONNECTIONS
from .cells import ANSWER_S, Bench, RunningCell, phases
from .contests import Contest, orders
from .results import Arm, Batch, Cell, Objective, Slice, SweepStep, knee_of
from .rows import Percentiles, TaskRow

STARTERS = 4  # Workers that start at the same time: each is busy importing for a second or two
USERS_PER_SLOT = 2  # Closed model: tasks in flight for each pool process, thread or greenlet
CHECKED_S = 20.0  # How long a checked load may take
TASKS_IN_A_ROW, LONGEST_SLICE_S = 4, 5.0
CHECKED_SLICE = 0  # The slice that checked loads count as: it is in no ratio
WARM_UP_TASKS = 10
"""For each slot, in a batch after the first: every pool process connects, and psycopg prepares what it sends often."""

DEMO_WORKLOAD, ORDERS_PER_SLOT = "mix", 12
DEMO_ROUNDS = 4  # The orders come in rounds, in which the arms take turns: what drifts on the machine hits both alike
PATIENCE_S, LOST_PATIENCE_S = 5.0, 0.3
"""How long to wait for the next answer; and of a worker that has already left some unanswered."""

Tell = Callable[[str], None]  # Shows the stage that something is at


@dataclass(frozen=True, slots=True)
class Schedule:
    """How much load an arm gets."""

    rounds: int  # Slices for each arm, over all batches; 0 to check only
    restarts: int  # Batches: how often the workers are started anew
    slice_s: float
    ramp_s: float  # Seconds at the begin of each slice that are not counted
    checked_tasks: int
    """Tasks for each pool process, thread or greenlet, of the load before the slices; a broken arm is out then."""

    def rounds_of(self, batch: int) -> int:
        """Return how many rounds the batch with this number has, from 1."""
        share, rest = divmod(self.rounds, self.restarts)
        return share + (batch <= rest)


def run_batch(
    bench: Bench, contest: Contest, number: int, options: Schedule, without: Collection[str], first_slice: int,
    tell: Tell,
) -> tuple[Batch, list[TaskRow]]:  # fmt: skip
    """Run one batch, and return what is kept of it, with a row for every task.

    Args:
        without: Names of the arms that were broken in an earlier batch: they are left out.
        first_slice: Number of the first slice; numbers are unique in a run.
    """
    arms, begun = [arm for arm in contest.arms if arm.name not in without], time.monotonic()
    stamp, slices = datetime.now(UTC).isoformat(timespec="seconds"), list[Slice]()
    with running_cells(bench, contest.workload, arms, tell) as cells:
        for cell in cells:
            tell(f"checking {cell.arm.name}")
            # What the check finds, it finds in the first batch; later ones are checked by what their slices leave.
            checked_load(cell, options.checked_tasks if number == 1 else WARM_UP_TASKS)
        options = replace(options, slice_s=slice_length(cells, options.slice_s))
        by_arm, rounds = {cell.arm: cell for cell in cells}, options.rounds_of(number)
        for turn, order in enumerate(orders(arms, rounds, f"{contest.name}/{number}"), start=1):
            tell(f"round {turn} of {rounds}")
            for position, arm in enumerate(order):
                if not by_arm[arm].out:
                    where = (first_slice + len(slices), turn, position)
                    slices.append(run_slice(by_arm[arm], options, *where))
                    by_arm[arm].abandon()
        tell("checking and stopping the workers")
        finished = finish(cells, at_once=number > 1)
    seconds = round(time.monotonic() - begun, 1)
    batch = Batch(contest.name, number, contest.workload, contest.reference.name, finished, slices, stamp, seconds)
    return batch, [row for cell in cells for row in cell.rows]


@contextmanager
def running_cells(bench: Bench, workload: str, arms: Sequence[Arm], tell: Tell) -> Iterator[list[RunningCell]]:
    """Start a cell for each arm, several at a time, count their connections, and close them when the block ends.

    Raises:
        LoadTestError: The workers, all up at once, could not all connect: they would look broken.
    """
    # One for each task that runs, and one for whoever looks: ours, and the server's own.
    needed = sum((TUNED_CONNECTIONS if arm.pool == ASYNCIO else arm.concurrency) + 1 for arm in arms) + 10
    if bench.server and not bench.user_task and needed > bench.server.max_connections:
        raise LoadTestError(
            f"{len(arms)} workers need about {needed} connections at once; the database server accepts "
            f"{bench.server.max_connections}. Lower --concurrency, compare fewer patterns, or raise max_connections."
        )
    assert bench.generator is not None
    cells = [RunningCell(bench, arm, workload) for arm in arms]
    tell(f"starting {len(cells)} workers")
    with ThreadPoolExecutor(STARTERS) as threads:
        try:
            _all(threads, cells, RunningCell.start)
            for cell in cells:
                cell.connect()
            names = [cell.connections_name for cell in cells if cell.connections_name]
            # A database of the user's is shared: there the name of the worker's program tells.
            by = "application_name" if bench.user_task else "datname"
            sampler = Sampler(bench.server.url, names, by=by) if bench.server and names else None
            with sampler or nullcontext():
                for cell in cells:
                    cell.sampler = sampler
                yield cells
            for cell in cells:
                if cell.worker is not None:
                    bench.generator.ask(ANSWER_S, close={"arm": cell.arm.name})
        finally:
            _all(threads, cells, RunningCell.close)


def _all(threads: ThreadPoolExecutor, cells: Sequence[RunningCell], step: Callable[[RunningCell], None]) -> None:
    """Take a step with every cell; only then raise what one of them raised."""
    steps = [threads.submit(step, cell) for cell in cells]
    errors = [error for future in steps if (error := future.exception())]
    if errors:
        raise errors[0]


def checked_load(cell: RunningCell, tasks_per_slot: int) -> None:
    """Send a fixed number of tasks, which also warms every pool process up; a worker that breaks anything is out."""
    if not cell.out:
        slots = cell.arm.concurrency
        load = {"tasks": tasks_per_slot * slots, "users": USERS_PER_SLOT * slots}
        cell.measure(number=CHECKED_SLICE, within_s=CHECKED_S, **load)
    with cell.sampler.paused() if cell.sampler else nullcontext():
        cell.check()
    cell.abandon()


def slice_length(cells: Sequence[RunningCell], wanted_s: float) -> float:
    """Return how long the slices of a contest are: long enough for several tasks of its slowest arm in a row.

    A slice counts what ends within it; tasks that take as long as it would hardly ever be counted.
    """
    medians_ms = [found["latency"].p50 for cell in cells if (found := phases(cell.rows)) and not cell.out]
    return max(wanted_s, min(TASKS_IN_A_ROW * max(medians_ms, default=0) / 1000, LONGEST_SLICE_S))


def run_slice(cell: RunningCell, options: Schedule, number: int, turn: int, position: int) -> Slice:
    """Put one arm under load for a slice, and measure what it cost."""
    load = {"seconds": options.slice_s, "ramp_s": options.ramp_s, "users": USERS_PER_SLOT * cell.arm.concurrency}
    answer, kept, cost = cell.measure(number=number, within_s=options.slice_s + options.ramp_s, **load)
    return Slice(
        number, turn, position, cell.arm.name, succeeded=answer["succeeded"], tasks=answer["tasks"],
        worker_cpu_s=round(cost.worker_s, 3),
        database_cpu_s=None if cost.database_s is None else round(cost.database_s, 3),
        generator_cpu_s=round(answer["cpu_s"], 3), wall_s=round(cost.wall_s, 3), **kept,
    )  # fmt: skip


def finish(cells: Sequence[RunningCell], *, at_once: bool = False) -> list[Cell]:
    """Check and stop all cells at the same time.

    Args:
        at_once: Kill the workers, when an earlier batch has seen how they stop.
    """
    for cell in () if at_once else cells:
        # All while all still run: they share pages, and each counts its share.
        cell.measure_memory()
    # Stopping is mostly waiting.
    with ThreadPoolExecutor(max(1, len(cells))) as threads:
        return list(threads.map(lambda cell: cell.finish(at_once=at_once), cells))


def run_demo(bench: Bench, contests: Sequence[Contest], number: int, tell: Tell) -> list[tuple[Batch, list[TaskRow]]]:
    """Give the recipe and celery-alchemy the same orders, all workers up at once; return what is kept of each contest.

    Speed and CPU are those of a fixed load on arms that may be broken: what the benchmark otherwise refuses to compare.
    """
    stamp, begun = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    arms = [arm for contest in contests for arm in contest.arms]
    with running_cells(bench, DEMO_WORKLOAD, arms, tell) as cells:
        by_arm = {cell.arm: cell for cell in cells}
        for turn, order in enumerate(orders(arms, DEMO_ROUNDS, f"demo/{number}"), start=1):
            for cell in (by_arm[arm] for arm in order):
                if cell.worker is None:
                    continue
                tell(f"round {turn} of {DEMO_ROUNDS}: {cell.arm.name}")
                tasks = ORDERS_PER_SLOT * cell.arm.concurrency
                patience_s = LOST_PATIENCE_S if cell.hangs else PATIENCE_S
                # All at once: what a worker leaves undone is then seen, whatever it does with the first of them.
                _, _, cost = cell.measure(number=turn, within_s=CHECKED_S, tasks=tasks, users=tasks, drain_s=patience_s)
                cell.counted.append(cost)
        tell("checking and stopping the workers")
        finished = {cell.arm: cell for cell in finish(cells)}
    seconds = round(time.monotonic() - begun, 1)
    kept = []
    for contest in contests:
        own = [finished[arm] for arm in contest.arms]
        batch = Batch(contest.name, number, DEMO_WORKLOAD, contest.reference.name, own, [], stamp, seconds)
        rows = [replace(row, slice=0) for arm in contest.arms for row in by_arm[arm].rows]
        kept.append((batch, rows))
    return kept


FRACTIONS = (0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0, 1.15)
"""Of what the arm answers under a closed load: where its knee is looked for."""
REFINEMENTS = 2  # Steps between the last rate that met the objective and the first that did not
RAMP_S = 0.5


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """How a sweep goes up."""

    objective: Objective
    step_s: float
    rates_per_s: tuple[float, ...]
    """Offered rates, rising; empty: fractions of what the arm answers under a closed load."""
    sweeps: int  # How often the knee of an arm is measured, each time with a worker started anew
    checked_tasks: int


def run_sweep(
    bench: Bench, arm: Arm, workload: str, options: SweepOptions, number: int, first_slice: int, tell: Tell
) -> tuple[list[SweepStep], list[TaskRow]]:
    """Sweep one arm; return its steps by rising rate, the last with the verdicts of all of them, and a row per task."""
    steps: list[SweepStep] = []
    with running_cells(bench, workload, [arm], tell) as (cell,):
        tell("checked load")
        checked_load(cell, options.checked_tasks)

        def step(rate: float) -> None:
            tell(f"{rate:.0f} tasks/s offered")
            if cell.sampler:
                cell.sampler.forget()
            steps.append(replace(_step(cell, workload, rate, options, first_slice + 1 + len(steps)), sweep=number))

        for rate in options.rates_per_s or _rates(cell, options, first_slice):
            # One step can be unlucky; after two, a higher rate only makes the queue longer.
            if cell.out or (len(steps) > 1 and not steps[-1].met and not steps[-2].met):
                break
            step(rate)
        for _ in range(0 if options.rates_per_s else REFINEMENTS):
            kept, knee = knee_of(steps)
            if cell.out or not kept or not knee:
                break
            step(round((kept.offered_per_s + knee.offered_per_s) / 2, 1))
        (finished,) = finish([cell])
    steps.sort(key=lambda one: one.offered_per_s)
    steps = steps or [SweepStep(arm, workload, 0.0, 0.0, 0.0, 0, 0, None, 0.0, 0, 0.0, False, sweep=number)]
    steps[-1] = replace(steps[-1], verdicts=finished.verdicts)
    return steps, cell.rows


def _rates(cell: RunningCell, options: SweepOptions, number: int) -> Iterator[float]:
    """Yield rates up to a little more than what the arm answers when it is never without work."""
    if cell.out:
        return
    users = 2 * USERS_PER_SLOT * cell.arm.concurrency
    answer, _, _ = cell.measure(
        number=number, within_s=options.step_s + RAMP_S, seconds=options.step_s / 2, ramp_s=RAMP_S, users=users
    )
    low, high = answer["window"]
    ceiling = answer["succeeded"] / (high - low)
    yield from (max(1.0, round(ceiling * fraction, 1)) for fraction in FRACTIONS)


def _step(cell: RunningCell, workload: str, rate: float, options: SweepOptions, number: int) -> SweepStep:
    answer, kept, _ = cell.measure(
        number=number, within_s=options.step_s + RAMP_S, seconds=options.step_s, ramp_s=RAMP_S, rate_per_s=rate,
        limit_ms=options.objective.limit_ms,
    )  # fmt: skip
    clean = not answer["failed"] and not answer["unanswered"] and not answer["skipped"]
    return SweepStep(
        cell.arm, workload, rate,
        achieved_per_s=round(answer["succeeded"] / kept["seconds"], 2),
        peak_connections=cell.peak.total,
        # What is not achieved waits, and its latency counts from when it should have been sent.
        met=clean and options.objective.met(kept["latency"]),
        uncorrected=Percentiles(**found) if (found := answer["uncorrected_ms"]) else None,
        slice=number, late=answer["late"], skipped=answer["skipped"], **kept,
    )  # fmt: skip
