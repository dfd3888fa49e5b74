"""The same orders for the hand-written recipe and for celery-alchemy, under each worker pool, counted one by one.

Speed and CPU are those of a fixed load on arms that may be broken: what the benchmark otherwise refuses to compare.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from .batches import Tell, finish, running_cells
from .cells import Bench
from .contests import Contest, orders
from .results import Batch
from .rows import TaskRow

WORKLOAD = "mix"
ORDERS_PER_SLOT = 12
ROUNDS = 4
"""The orders come in rounds, in which the arms take turns: what drifts on the machine hits both alike."""
LOAD_S = 20.0
PATIENCE_S, LOST_PATIENCE_S = 5.0, 0.3
"""How long to wait for the next answer; and of a worker that has already left some unanswered."""


def run_demo(bench: Bench, contests: Sequence[Contest], tell: Tell) -> list[tuple[Batch, list[TaskRow]]]:
    """Run all contests with all their workers up at once; return what is kept of each."""
    stamp, begun = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    arms = [arm for contest in contests for arm in contest.arms]
    with running_cells(bench, WORKLOAD, arms, tell) as (cells, sampler):
        by_arm = {cell.arm: cell for cell in cells}
        for turn, order in enumerate(orders(arms, ROUNDS, "demo"), start=1):
            for cell in (by_arm[arm] for arm in order):
                if cell.worker is None:
                    continue
                tell(f"round {turn} of {ROUNDS}: {cell.arm.name}")
                tasks = ORDERS_PER_SLOT * cell.arm.concurrency
                patience_s = LOST_PATIENCE_S if cell.hangs else PATIENCE_S
                # All at once: what a worker leaves undone is then seen, whatever it does with the first of them.
                _, _, cost = cell.measure(number=turn, within_s=LOAD_S, tasks=tasks, users=tasks, drain_s=patience_s)
                cell.counted.append(cost)
        tell("checking and stopping the workers")
        finished = {cell.arm: cell for cell in finish(cells, sampler)}
    seconds = round(time.monotonic() - begun, 1)
    kept = []
    for contest in contests:
        own = [finished[arm] for arm in contest.arms]
        batch = Batch(contest.name, 1, WORKLOAD, contest.reference.name, own, [], stamp, seconds)
        rows = [replace(row, slice=0) for arm in contest.arms for row in by_arm[arm].rows]
        kept.append((batch, rows))
    return kept
