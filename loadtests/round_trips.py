"""How often a task waits for the database's answer: exact where rates are noisy, and what counts on a slow network.

One worker per pattern, running one task at a time, on a database of its own behind a proxy that counts.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from celery import Celery

from .brokers import Broker, queue_of
from .databases import DatabaseServer, create_tables
from .environment import WorkerEnvironment
from .errors import WorkerError
from .patterns import OURS, PATTERNS
from .proxy import CountingProxy, counting_proxy
from .replies import Outcome, Reply, ReplyList
from .rundir import RunDirectory
from .worker import Worker, running_worker
from .workloads import ACCOUNTS, WORKLOADS, Workload

TASKS = 20
WARM_UP = 10
"""Tasks that are not counted: psycopg prepares a statement, in a round trip of its own, when it sends it again."""
ANSWER_S = 30.0
QUIET_S = 0.3
"""Some patterns end their Session after the task has answered."""


@dataclass(frozen=True, slots=True)
class Sender:
    """Sends the tasks of one workload, and waits for their ends; a few of them, so without Locust."""

    environment: WorkerEnvironment
    app: Any
    replies: ReplyList
    alive: Callable[[], bool] = lambda: True

    def run(self, workload: Workload, numbers: Iterable[int], pattern: str = "") -> list[Reply]:
        """Send one task for each number, and return the replies that ended them.

        Raises:
            WorkerError: One was not answered, or failed although it should not.
        """
        waiting: dict[str, int] = {}
        for number in numbers:
            task_id = uuid.uuid4().hex
            waiting[task_id] = number
            self.app.send_task(workload.task_name, (number,), task_id=task_id, ignore_result=True)
        ended: list[Reply] = []
        deadline = time.monotonic() + ANSWER_S
        while waiting:
            for message in self.replies.pop(timeout_s=0.25):
                reply = Reply.from_json(message)
                if reply.outcome is Outcome.RETRY or reply.task_id not in waiting:
                    continue
                expected = workload.expected_error(waiting.pop(reply.task_id))
                if (reply.error_type or "") != expected:
                    raise WorkerError(
                        f"{workload.name} under {pattern or 'the worker'} failed: {reply.error_type}: {reply.error}"
                    )
                ended.append(reply)
            if waiting and (time.monotonic() > deadline or not self.alive()):
                raise WorkerError(f"{len(waiting)} tasks of {workload.name} were not answered.")
        return ended


@contextmanager
def sender(environment: WorkerEnvironment, worker: Worker | None = None) -> Iterator[Sender]:
    """Yield a Sender to the worker of `environment`."""
    app: Any = Celery("celery-alchemy-sender", set_as_current=False)
    app.conf.update(environment.celery_settings())
    replies = ReplyList(environment.reply_url, environment.reply_key)
    try:
        yield Sender(environment, app, replies, (lambda: worker.alive) if worker else (lambda: True))
    finally:
        replies.close()
        app.close()


def measure(
    run: RunDirectory,
    server: DatabaseServer,
    broker: Broker,
    patterns: Sequence[str] = tuple(PATTERNS),
    workloads: Sequence[str] = tuple(WORKLOADS),
    *,
    tasks: int = TASKS,
    strategy: str = "local",
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, float]]:
    """Count round trips per task, connecting included where a pattern connects in each task.

    Args:
        tasks: How many to count, a multiple of ten for `mix`.
        strategy: Ours; the strategies send the same statements, as the tests check.
        progress: Called with the name of each pattern before it is measured.
    Returns:
        By name of the workload, then of the pattern: round trips per task that was sent, to 0.01. Those of `fan_out`
        include its parts, those of `mix` its retries.
    Raises:
        WorkerError: A worker did not start, or a task failed.
    """
    counted: dict[str, dict[str, float]] = {name: {} for name in workloads}
    for pattern in patterns:
        progress(pattern)
        chosen = strategy if pattern == OURS else None
        with _worker(run, server, broker, pattern, chosen) as (proxy, tell):
            for name in workloads:
                tell.run(WORKLOADS[name], range(WARM_UP), pattern)
                before = _settled(proxy)
                tell.run(WORKLOADS[name], range(tasks), pattern)
                counted[name][pattern] = round((_settled(proxy) - before) / tasks, 2)
    return counted


@contextmanager
def _worker(
    run: RunDirectory, server: DatabaseServer, broker: Broker, pattern: str, strategy: str | None
) -> Iterator[tuple[CountingProxy, Sender]]:
    name = f"trips-{pattern}{f'-{strategy}' if strategy else ''}"
    with server.fresh_database(run, name.replace("-", "_")) as database:
        create_tables(database, ACCOUNTS)
        with counting_proxy(database) as proxy:
            environment = WorkerEnvironment(
                database_url=proxy.url.render_as_string(hide_password=False),
                broker_url=broker.url,
                reply_url=broker.reply_url,
                queue=f"celery-alchemy-{run.id}-{name}",
                pattern=pattern,
            )
            with (
                queue_of(run, environment),
                running_worker(run, environment, pool="solo", concurrency=1, strategy=strategy, name=name) as worker,
                sender(environment, worker) as tell,
            ):
                yield proxy, tell


def _settled(proxy: CountingProxy) -> int:
    """Return the count once it has stood still."""
    while True:
        seen = proxy.round_trips
        time.sleep(QUIET_S)
        if proxy.round_trips == seen:
            return seen
