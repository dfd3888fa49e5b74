"""Open load on one arm, rising until the latency objective breaks: how much is too much, and how does it show?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from ..percentiles import Percentiles
from ..rows import TaskRow
from .batches import BatchOptions, Progress, checked_load, finish, running_cells, sampler_of
from .cells import Bench, RunningCell
from .measure import CpuClock, spent
from .objective import Objective
from .results import Arm, SweepStep, knee_of

FRACTIONS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0, 1.15)
"""Of what the arm answers under a closed load: where its knee is looked for."""
REFINEMENTS = 2
"""Steps between the last rate that met the objective and the first that did not."""
RAMP_S = 0.5


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """How a sweep goes up."""

    objective: Objective
    step_s: float
    rates_per_s: tuple[float, ...]
    """Offered rates, rising; empty: fractions of what the arm answers under a closed load."""
    checked_tasks: int
    users_per_slot: int


def run_sweep(
    bench: Bench, arm: Arm, workload: str, options: SweepOptions, first_slice: int, progress: Progress
) -> tuple[list[SweepStep], list[TaskRow]]:
    """Sweep one arm; return its steps by rising rate, the last with the verdicts of all of them, and a row per task."""
    with running_cells(bench, workload, [arm], progress) as cells, sampler_of(bench, cells) as sampler:
        (cell,) = cells
        closed = BatchOptions(0, options.step_s, RAMP_S, options.checked_tasks, options.users_per_slot)
        progress("checked load")
        checked_load(cell, closed, options.checked_tasks)
        with sampler.paused() if sampler else nullcontext():
            cell.check(None, None)

        def step(rate: float) -> SweepStep:
            progress(f"{rate:.0f} tasks/s offered")
            if sampler:
                sampler.forget()
            taken = _step(bench, cell, workload, rate, options, first_slice + 1 + len(steps))
            peak = sampler.peaks.get(str(cell.database.database)) if sampler and cell.database else None
            return replace(taken, peak_connections=peak.total if peak else 0)

        steps: list[SweepStep] = []
        for rate in options.rates_per_s or _rates(cell, options, first_slice):
            if cell.out or _twice_too_much(steps):
                break
            steps.append(step(rate))
        for _ in range(0 if options.rates_per_s else REFINEMENTS):
            between = _between(steps)
            if cell.out or between is None:
                break
            steps.append(step(between))
        steps.sort(key=lambda one: one.offered_per_s)
        (finished,) = finish(cells, sampler)
    if not steps:
        steps = [SweepStep(arm, workload, 0.0, 0.0, 0.0, 0, 0, None, 0.0, 0.0, 0, 0.0, False)]
    steps[-1] = replace(steps[-1], verdicts=finished.verdicts)
    return steps, cell.rows


def _rates(cell: RunningCell, options: SweepOptions, number: int) -> Iterator[float]:
    """Yield rates up to a little more than what the arm answers when it is never without work."""
    if cell.out:
        return
    answer = cell.load(
        number=number,
        within_s=options.step_s + RAMP_S,
        seconds=options.step_s / 2,
        ramp_s=RAMP_S,
        users=2 * options.users_per_slot * cell.arm.concurrency,
    )
    low, high = answer["window"]
    ceiling = answer["succeeded"] / (high - low)
    yield from (max(1.0, round(ceiling * fraction, 1)) for fraction in FRACTIONS)


def _step(bench: Bench, cell: RunningCell, workload: str, rate: float, options: SweepOptions, number: int) -> SweepStep:
    begin, started = CpuClock.read(), time.monotonic()
    answer = cell.load(
        number=number,
        within_s=options.step_s + RAMP_S,
        seconds=options.step_s,
        ramp_s=RAMP_S,
        rate_per_s=rate,
        arrival="poisson",
    )
    wall_s = time.monotonic() - started
    cost = spent(begin, CpuClock.read(), wall_s, cell.worker_pid, bench.server.pid if bench.server else None)
    low, high = answer["window"]
    achieved = answer["succeeded"] / (high - low)
    latency = Percentiles(**answer["latency_ms"]) if answer["latency_ms"] else None
    clean = not answer["failed"] and not answer["unanswered"]
    return SweepStep(
        arm=cell.arm,
        workload=workload,
        offered_per_s=rate,
        seconds=round(high - low, 3),
        achieved_per_s=round(achieved, 2),
        failed=answer["failed"],
        unanswered=answer["unanswered"],
        latency=latency,
        worker_cpus=round(cost.worker_s / wall_s, 3),
        foreign_cpus=round(cost.foreign_cpus, 3),
        peak_connections=0,
        send_lag_p99_ms=answer["send_lag_p99_ms"],
        # What is not achieved waits, and its latency counts from when it should have been sent.
        met=clean and options.objective.met(latency),
    )


def _twice_too_much(steps: Sequence[SweepStep]) -> bool:
    # One step can be unlucky; after two, a higher rate only makes the queue longer.
    return len(steps) >= 2 and not steps[-1].met and not steps[-2].met


def _between(steps: Sequence[SweepStep]) -> float | None:
    """Return the rate halfway between the last one that kept the objective and the first that did not."""
    kept, knee = knee_of(steps)
    return round((kept.offered_per_s + knee.offered_per_s) / 2, 1) if kept and knee else None
