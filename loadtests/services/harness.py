"""A worker on a database and a queue of its own, and what comes of the tasks it is sent."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from celery import Celery
from sqlalchemy import URL, NullPool, create_engine, text

from ..errors import WorkerError
from ..tasks.patterns import OURS
from ..tasks.replies import Outcome, Reply, ReplyList
from ..tasks.workloads import ACCOUNTS, Workload
from .brokers import Broker, broker, queue_of
from .databases import DatabaseServer, create_tables, database_server
from .environment import WorkerEnvironment
from .proxy import Proxy
from .rundir import RunDirectory, run_directory
from .worker import Worker, running_worker

ANSWER_S = 30.0


class Services(NamedTuple):
    """What the workers of a run share."""

    run: RunDirectory
    server: DatabaseServer
    broker: Broker


@contextmanager
def services(database_url: str | None = None, broker_url: str | None = None) -> Iterator[Services]:
    """Start what is not given, for the time of the block; see `database_server` and `broker`."""
    with (
        run_directory() as run,
        database_server(run, database_url) as server,
        broker(run, broker_url) as the_broker,
    ):
        yield Services(run, server, the_broker)


@dataclass(slots=True)
class Sent:
    """A task that was sent, and the replies to its attempts."""

    number: int
    task_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    replies: list[Reply] = field(default_factory=list)

    @property
    def final(self) -> list[Reply]:
        """The replies that end it: one, if all is well."""
        return [reply for reply in self.replies if reply.outcome is not Outcome.RETRY]


AnySent = TypeVar("AnySent", bound=Sent)


class LoadWorker:
    """A running worker with its database and its queue."""

    worker: Worker
    pool: str
    environment: WorkerEnvironment
    database: URL

    def __init__(
        self, worker: Worker, pool: str, environment: WorkerEnvironment, database: URL, proxy: Proxy | None
    ) -> None:
        self.worker, self.pool, self.environment, self.database = worker, pool, environment, database
        self.proxy: Any = proxy  # Between the worker and its database; None if there is none
        self.replies: ReplyList = ReplyList(environment.reply_url, environment.reply_key)
        self.sent: dict[str, Sent] = {}
        self.unknown: list[Reply] = []  # Replies to tasks that were not sent here
        self._client: Any = Celery("client", set_as_current=False)
        self._client.conf.update(environment.celery_settings())
        self._engine = create_engine(database, poolclass=NullPool, isolation_level="AUTOCOMMIT")

    def close(self) -> None:
        """Close the connections to the broker and the database."""
        self.replies.close()
        self._client.close()
        self._engine.dispose()

    def post(self, name: str, task: AnySent, args: tuple[Any, ...] | None = None, **options: Any) -> AnySent:
        """Send a task by its name; its arguments are its number where no others are given."""
        self.sent[task.task_id] = task
        args = (task.number,) if args is None else args
        self._client.send_task(name, args, task_id=task.task_id, ignore_result=True, **options)
        return task

    def collect(
        self, tasks: Collection[Sent], *, over: Callable[[], bool] | None = None, patience_s: float = ANSWER_S,
        reply_key: str | None = None,
    ) -> bool:  # fmt: skip
        """Take replies until all `tasks` have ended, or `over()`.

        Args:
            patience_s: How long to wait for the next reply.
            reply_key: Another list than the worker's own.
        Returns:
            Whether it is so; False if nothing came for so long, or if the worker has ended.
        """
        over = over or (lambda: all(task.final for task in tasks))
        deadline = time.monotonic() + patience_s
        while not over():
            if time.monotonic() > deadline or not self.worker.alive:
                return False
            for message in self.replies.pop(timeout_s=0.25, key=reply_key):
                reply = Reply.from_json(message)
                known = self.sent.get(reply.task_id)
                (known.replies if known else self.unknown).append(reply)
                deadline = time.monotonic() + patience_s
        return True

    def run(self, workload: Workload, numbers: Iterable[int]) -> list[Reply]:
        """Send one task for each number, and return the replies that ended them.

        Raises:
            WorkerError: One was not answered, or failed although it should not.
        """
        tasks = [self.post(workload.task_name, Sent(number)) for number in numbers]
        ended = self.collect(tasks)
        where = f"{workload.name} under {self.environment.pattern}"
        for task in tasks:
            for reply in task.final:
                if (reply.error_type or "") != workload.expected_error(task.number):
                    raise WorkerError(f"{where} failed: {reply.error_type}: {reply.error}")
        if not ended:
            raise WorkerError(f"{sum(not task.final for task in tasks)} tasks of {where} were not answered.")
        return [task.final[0] for task in tasks]

    def rows(self, sql: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a statement in the worker's database."""
        with self._engine.connect() as connection:
            found = connection.execute(text(sql), parameters)
            return [tuple(row) for row in found] if found.returns_rows else []


AnyLoadWorker = TypeVar("AnyLoadWorker", bound=LoadWorker)


@contextmanager
def load_worker(
    given: Services, *, pool: str, kind: type[AnyLoadWorker], pattern: str = OURS, concurrency: int = 1,
    name: str = "", queue: str = "", accounts: int = ACCOUNTS, proxied: Callable[[URL], Proxy] | None = None,
    application_name: str = "", used_in_main: bool = False, **options: Any,
) -> Iterator[AnyLoadWorker]:  # fmt: skip
    """Start a worker with a database and a queue of its own; all are gone when the block ends.

    Args:
        kind: LoadWorker, or a class derived from it.
        proxied: Makes the proxy through which the worker reaches its database.
        application_name: Of the worker's sessions on PostgreSQL.
        options: Of `running_worker`.
    Raises:
        WorkerError: It ended, or was not ready in time.
    """
    run, broker = given.run, given.broker
    name = f"{name or f'{pool}-{pattern}'}-{uuid.uuid4().hex[:6]}"
    with ExitStack() as stack:
        database = stack.enter_context(given.server.fresh_database(run, name.replace("-", "_")))
        create_tables(database, accounts)
        proxy = stack.enter_context(proxied(database)) if proxied else None
        url = proxy.url if proxy else database
        if application_name:
            url = url.update_query_dict({"application_name": application_name})
        address, queue = url.render_as_string(hide_password=False), queue or f"celery-alchemy-{run.id}-{name}"
        environment = WorkerEnvironment(address, broker.url, broker.reply_url, queue, pattern, used_in_main)
        stack.enter_context(queue_of(run, environment))
        worker = stack.enter_context(
            running_worker(run, environment, pool=pool, concurrency=concurrency, name=name, **options)
        )
        yield stack.enter_context(contextlib.closing(kind(worker, pool, environment, database, proxy)))
