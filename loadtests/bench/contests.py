"""What is compared with what: arms, contests, and the order in which arms take their turns."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..patterns import OURS
from .results import Arm

AUTO = "auto"
STRATEGIES = ("local", "scoped", "per_process")
ALONE = ("solo",)
"""Worker pools that run one task at a time, whatever the concurrency."""


@dataclass(frozen=True, slots=True)
class Contest:
    """Arms under one workload, compared in turns."""

    name: str
    """`patterns/<worker pool>/<workload>` or `pools/<workload>`."""
    workload: str
    arms: tuple[Arm, ...]
    reference: Arm
    """What the others are divided by; one of the arms."""

    def __post_init__(self) -> None:
        assert self.reference in self.arms
        assert len({arm.name for arm in self.arms}) == len(self.arms)


def concurrency_of(pool: str, wanted: int) -> int:
    """Return the concurrency a worker pool can have: 1 for solo."""
    return 1 if pool in ALONE else wanted


def patterns_contest(
    workload: str,
    reference: Arm,
    strategies: Sequence[str] = (),
    baselines: Sequence[str] = (),
    automatic: Mapping[str, str] | None = None,
) -> Contest:
    """Return the contest of all session patterns under one worker pool.

    Args:
        reference: What the others are compared with; it is there twice: the second copy shows the noise floor.
        strategies: Ours to compare with it.
        automatic: What `auto` chooses, by worker pool: asking for it by name would be a third copy.
    """
    pool, workers = reference.pool, reference.concurrency
    own = {reference.strategy, AUTO, (automatic or {}).get(pool)}
    others = [Arm(pool, workers, OURS, name) for name in strategies if name not in own]
    by_hand = [Arm(pool, workers, name) for name in baselines]
    arms = (reference, replace(reference, copy=1), *others, *by_hand)
    return Contest(f"patterns/{pool}/{workload}", workload, arms, reference)


def pools_contest(workload: str, arms: Sequence[Arm]) -> Contest:
    """Return the contest of worker pools and concurrencies; the first arm is the reference, and there twice."""
    reference, *others = dict.fromkeys(arms)
    return Contest(f"pools/{workload}", workload, (reference, replace(reference, copy=1), *others), reference)


def orders(arms: Sequence[Arm], rounds: int, seed: str) -> Iterator[list[Arm]]:
    """Yield the order of each round: a random one, then the same backwards.

    Whatever drifts over a round or goes with a position in it then hits all arms alike.
    """
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret.
    order = list(arms)
    for number in range(rounds):
        if number % 2:
            order = order[::-1]
        else:
            rng.shuffle(order)
        yield list(order)
