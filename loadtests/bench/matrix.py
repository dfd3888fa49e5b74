"""All contests of a run, batch by batch: every contest once, then every contest again with workers started anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .batches import BatchOptions, run_batch
from .cells import Bench
from .contests import Contest
from .results import Batch
from .store import Store


@dataclass(frozen=True, slots=True)
class MatrixOptions:
    """How long to measure."""

    rounds: int
    """Slices for each arm, over all batches."""
    restarts: int
    """Batches: how often the workers are started anew."""
    slice_s: float
    ramp_s: float
    checked_tasks: int
    users_per_slot: int

    def of_batch(self, number: int) -> BatchOptions:
        """Return what is measured in the batch with this number, from 1."""
        share, rest = divmod(self.rounds, self.restarts)
        rounds = share + (1 if number <= rest else 0)
        return BatchOptions(rounds, self.slice_s, self.ramp_s, self.checked_tasks, self.users_per_slot)


def remaining(
    store: Store, contests: Sequence[Contest], restarts: int, only: Sequence[str] = ()
) -> list[tuple[Contest, int]]:
    """Return the batches that are still to run, in their order.

    Args:
        only: Patterns of the names of contests, as in a shell; none: all.
    """
    wanted = [contest for contest in contests if not only or any(fnmatchcase(contest.name, one) for one in only)]
    batches = [(contest, number) for number in range(1, restarts + 1) for contest in wanted]
    return [(contest, number) for contest, number in batches if (contest.name, number) not in store.done]


def run_matrix(
    bench: Bench,
    store: Store,
    batches: Sequence[tuple[Contest, int]],
    options: MatrixOptions,
    progress: Callable[[Contest, int, str], None],
) -> Iterator[Batch]:
    """Run the batches one after the other; each is kept before it is yielded."""
    for contest, number in batches:
        batch, rows = run_batch(
            bench,
            contest,
            number,
            options.of_batch(number),
            without=store.broken[contest.name],
            first_slice=store.next_slice,
            progress=lambda stage, contest=contest, number=number: progress(contest, number, stage),  # type: ignore[misc]
        )
        store.add_batch(batch, rows)
        yield batch
