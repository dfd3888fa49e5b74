"""Workers of the load tests' own app, and what came of the tasks they were sent."""

import contextlib
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from signal import SIGTERM
from typing import Any, NamedTuple

from celery import Celery
from sqlalchemy import URL, NullPool, create_engine, text

from celery_alchemy.loadtests.brokers import Broker, queue_of
from celery_alchemy.loadtests.databases import DatabaseServer, create_tables
from celery_alchemy.loadtests.environment import WorkerEnvironment
from celery_alchemy.loadtests.patterns import OURS
from celery_alchemy.loadtests.processes import StopStep
from celery_alchemy.loadtests.replies import Outcome, Reply, ReplyList
from celery_alchemy.loadtests.rundir import RunDirectory
from celery_alchemy.loadtests.worker import Worker, running_worker
from celery_alchemy.loadtests.workloads import ACCOUNTS, Workload

ANSWER_S = 30.0
STOP_STEPS = (StopStep(SIGTERM, 5.0),)  # a broken pattern may never stop


class Bench(NamedTuple):
    """What the workers of a test module share."""

    run: RunDirectory
    server: DatabaseServer
    broker: Broker


@dataclass
class Ended:
    """What came of a task."""

    number: int
    task_id: str
    replies: list[Reply] = field(default_factory=list)

    @property
    def final(self) -> list[Reply]:
        return [reply for reply in self.replies if reply.outcome is not Outcome.RETRY]


@dataclass
class LoadWorker:
    """A running worker with its database and its queue."""

    worker: Worker
    environment: WorkerEnvironment
    database: URL
    client: Any

    def send(self, workload: Workload, numbers: Iterable[int], reply_to: str | None = None) -> list[Ended]:
        """Send a task for each number."""
        return [self.send_named(workload.task_name, (number,), reply_to) for number in numbers]

    def send_named(self, name: str, args: tuple[Any, ...] = (), reply_to: str | None = None) -> Ended:
        """Send any task."""
        task = Ended(args[0] if args else 0, uuid.uuid4().hex)
        headers = {"loadtest_reply": reply_to} if reply_to else None
        self.client.send_task(name, args, task_id=task.task_id, headers=headers, ignore_result=True)
        return task

    def collect(
        self, tasks: list[Ended], reply_to: str | None = None, enough: Callable[[], bool] | None = None
    ) -> list[Ended]:
        """Wait until all tasks have ended, or `enough()`; there may be no reply to anything else."""
        replies = ReplyList(self.environment.reply_url, reply_to or self.environment.reply_key)
        by_id = {task.task_id: task for task in tasks}
        over = enough or (lambda: all(task.final for task in tasks))
        deadline = time.monotonic() + ANSWER_S
        try:
            while not over():
                assert self.worker.alive, self.worker.process.log_tail()
                assert time.monotonic() < deadline, f"{tasks}\n{self.worker.process.log_tail()}"
                for message in replies.pop(timeout_s=0.25):
                    reply = Reply.from_json(message)
                    assert reply.task_id in by_id, f"a reply to an unknown task: {reply}"
                    by_id[reply.task_id].replies.append(reply)
        finally:
            replies.close()
        return tasks

    def call(self, workload: Workload, numbers: Iterable[int], reply_to: str | None = None) -> list[Ended]:
        """Send a task for each number, and wait for their ends."""
        return self.collect(self.send(workload, numbers, reply_to), reply_to)

    def ledger(self) -> dict[str, list[tuple[int, int]]]:
        """Return the ledger lines by task, each task's sorted."""
        lines = defaultdict(list)
        for task_id, account_id, amount in self._rows("SELECT transfer_id, account_id, amount FROM entry"):
            lines[task_id].append((account_id, amount))
        return {task_id: sorted(found) for task_id, found in lines.items()}

    def transactions(self) -> dict[str, int]:
        """Return by task how many transactions its ledger lines were written in."""
        rows = self._rows("SELECT transfer_id, count(DISTINCT xmin::text) FROM entry GROUP BY transfer_id")
        return {str(row[0]): int(row[1]) for row in rows}

    def _rows(self, sql: str) -> list[tuple[Any, ...]]:
        engine = create_engine(self.database, poolclass=NullPool)
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(sql))]


@contextlib.contextmanager
def load_worker(
    bench: Bench,
    pool: str,
    pattern: str = OURS,
    *,
    concurrency: int = 2,
    strategy: str | None = None,
    queue: str = "",
    **options: Any,
) -> Iterator[LoadWorker]:
    """Run a worker on a fresh database for the time of the block."""
    name = f"{pool}-{pattern}-{uuid.uuid4().hex[:6]}"
    with bench.server.fresh_database(bench.run, name.replace("-", "_")) as database:
        create_tables(database, ACCOUNTS)
        environment = WorkerEnvironment(
            database_url=database.render_as_string(hide_password=False),
            broker_url=bench.broker.url,
            reply_url=bench.broker.reply_url,
            queue=queue or f"celery-alchemy-{bench.run.id}-{name}",
            pattern=pattern,
        )
        client: Any = Celery("client", set_as_current=False)
        client.conf.update(environment.celery_settings())
        with (
            queue_of(bench.run, environment),
            contextlib.closing(client),
            running_worker(
                bench.run, environment, pool=pool, concurrency=concurrency, strategy=strategy, name=name,
                stop_steps=STOP_STEPS, **options,
            ) as worker,
        ):  # fmt: skip
            yield LoadWorker(worker, environment, database, client)


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
