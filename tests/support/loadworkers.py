"""Workers of the load tests' own app, and what came of the tasks they were sent."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from signal import SIGTERM
from typing import Any

from celery_alchemy.loadtests.services import harness
from celery_alchemy.loadtests.services.harness import Sent as Ended
from celery_alchemy.loadtests.services.harness import Services as Bench
from celery_alchemy.loadtests.services.processes import StopStep
from celery_alchemy.loadtests.tasks.patterns import OURS
from celery_alchemy.loadtests.tasks.workloads import Workload

STOP_STEPS = (StopStep(SIGTERM, 5.0),)  # a broken pattern may never stop


class LoadWorker(harness.LoadWorker):
    """A running worker with its database and its queue."""

    def send(self, workload: Workload, numbers: Iterable[int], reply_to: str | None = None) -> list[Ended]:
        """Send a task for each number."""
        return [self.send_named(workload.task_name, (number,), reply_to) for number in numbers]

    def send_named(self, name: str, args: tuple[Any, ...] = (), reply_to: str | None = None) -> Ended:
        """Send any task."""
        return self.post(
            name, Ended(args[0] if args else 0), args, headers={"loadtest_reply": reply_to} if reply_to else None
        )

    def ended(
        self, tasks: list[Ended], reply_to: str | None = None, enough: Callable[[], bool] | None = None
    ) -> list[Ended]:
        """Wait until all tasks have ended, or `enough()`; there may be no reply to anything else."""
        over = self.collect(tasks, over=enough, reply_key=reply_to)
        assert over, f"{tasks}\n{self.worker.process.log_tail()}"
        assert not self.unknown, "replies to unknown tasks"
        return tasks

    def call(self, workload: Workload, numbers: Iterable[int], reply_to: str | None = None) -> list[Ended]:
        """Send a task for each number, and wait for their ends."""
        return self.ended(self.send(workload, numbers, reply_to), reply_to)

    def ledger(self) -> dict[str, list[tuple[int, int]]]:
        """Return the ledger lines by task, each task's sorted."""
        lines = defaultdict(list)
        for task_id, account_id, amount in self.rows("SELECT transfer_id, account_id, amount FROM entry"):
            lines[task_id].append((account_id, amount))
        return {task_id: sorted(found) for task_id, found in lines.items()}

    def transactions(self) -> dict[str, int]:
        """Return by task how many transactions its ledger lines were written in."""
        rows = self.rows("SELECT transfer_id, count(DISTINCT xmin::text) FROM entry GROUP BY transfer_id")
        return {str(row[0]): int(row[1]) for row in rows}


@contextlib.contextmanager
def load_worker(
    bench: Bench, pool: str, pattern: str = OURS, *, concurrency: int = 2, **options: Any
) -> Iterator[LoadWorker]:
    """Run a worker on a fresh database for the time of the block."""
    with harness.load_worker(
        bench, pool=pool, pattern=pattern, concurrency=concurrency, stop_steps=STOP_STEPS, kind=LoadWorker, **options
    ) as worker:
        yield worker


def assert_right(worker: LoadWorker, workload: Workload, tasks: list[Ended]) -> None:
    """Fail unless each task ended once and as it was meant to, in a Session of its own, and left what it should."""
    ledger, transactions = worker.ledger(), worker.transactions()
    for task in tasks:
        assert len(task.final) == 1, task
        assert (task.final[0].error_type or "") == workload.expected_error(task.number), task
        assert [reply.breach for reply in task.replies] == [""] * len(task.replies), task
        expected = workload.expected_entries(task.number)
        assert ledger.get(task.task_id, []) == expected, task
        if expected:
            assert transactions[task.task_id] == workload.transactions, task
