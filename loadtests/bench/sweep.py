"""Open load on one arm, rising until the latency objective breaks: how much is too much, and how does it show?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .batches import Tell, checked_load, finish, running_cells
from .cells import Bench, RunningCell
from .results import Arm, Objective, SweepStep, knee_of
from .rows import Percentiles, TaskRow

FRACTIONS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0, 1.15)
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
    users_per_slot: int


def run_sweep(
    bench: Bench, arm: Arm, workload: str, options: SweepOptions, number: int, first_slice: int, tell: Tell
) -> tuple[list[SweepStep], list[TaskRow]]:
    """Sweep one arm; return its steps by rising rate, the last with the verdicts of all of them, and a row per task."""
    steps: list[SweepStep] = []
    with running_cells(bench, workload, [arm], tell) as (cell,):
        tell("checked load")
        checked_load(cell, options.users_per_slot, options.checked_tasks)

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
    steps = steps or [SweepStep(arm, workload, 0.0, 0.0, 0.0, 0, 0, None, 0.0, 0.0, 0, 0.0, False, sweep=number)]
    steps[-1] = replace(steps[-1], verdicts=finished.verdicts)
    return steps, cell.rows


def _rates(cell: RunningCell, options: SweepOptions, number: int) -> Iterator[float]:
    """Yield rates up to a little more than what the arm answers when it is never without work."""
    if cell.out:
        return
    users = 2 * options.users_per_slot * cell.arm.concurrency
    answer, _, _ = cell.measure(
        number=number, within_s=options.step_s + RAMP_S, seconds=options.step_s / 2, ramp_s=RAMP_S, users=users
    )
    low, high = answer["window"]
    ceiling = answer["succeeded"] / (high - low)
    yield from (max(1.0, round(ceiling * fraction, 1)) for fraction in FRACTIONS)


def _step(cell: RunningCell, workload: str, rate: float, options: SweepOptions, number: int) -> SweepStep:
    answer, kept, cost = cell.measure(
        number=number, within_s=options.step_s + RAMP_S, seconds=options.step_s, ramp_s=RAMP_S, rate_per_s=rate,
        limit_ms=options.objective.limit_ms,
    )  # fmt: skip
    uncorrected = answer["uncorrected_ms"]
    clean = not answer["failed"] and not answer["unanswered"] and not answer["skipped"]
    return SweepStep(
        cell.arm, workload, rate,
        achieved_per_s=round(answer["succeeded"] / kept["seconds"], 2),
        worker_cpus=round(cost.worker_s / cost.wall_s, 3),
        peak_connections=cell.peak.total,
        # What is not achieved waits, and its latency counts from when it should have been sent.
        met=clean and options.objective.met(kept["latency"]),
        uncorrected=Percentiles(**uncorrected) if uncorrected else None,
        slice=number, late=answer["late"], skipped=answer["skipped"], **kept,
    )  # fmt: skip
