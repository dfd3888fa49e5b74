"""Real `celery worker` processes: started, waited for, sent tasks to, and ended in bounded time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from celery import Celery
from sqlalchemy import URL, Engine, NullPool, create_engine, text

from ..errors import WorkerError
from ..reporting import READY_KEY, REPLY_URL
from ..tasks.patterns import OURS, PATTERNS
from ..tasks.replies import Outcome, Reply, ReplyList
from ..tasks.workloads import ACCOUNTS, Workload
from .databases import DatabaseServer, create_tables, database_server
from .environment import Broker, WorkerEnvironment, broker, queue_of
from .guard import with_package
from .processes import ChildProcess, StopStep, child_process
from .proxy import Proxy
from .rundir import RunDirectory, run_directory

ANSWER_S = 30.0


@dataclass(frozen=True, slots=True)
class Services:
    """What the workers of a run share."""

    run: RunDirectory
    server: DatabaseServer | None  # None if the tasks are somebody else's and their database is not known
    broker: Broker


@contextmanager
def services(
    database_url: str | None = None, broker_url: str | None = None, *, own_server: bool = True
) -> Iterator[Services]:
    """Start what is not given, for the time of the block; see `database_server` and `broker`.

    Args:
        own_server: Whether a database server is started if none is given.
    """
    with ExitStack() as stack:
        run = stack.enter_context(run_directory())
        server = stack.enter_context(database_server(run, database_url)) if database_url or own_server else None
        yield Services(run, server, stack.enter_context(broker(run, broker_url)))


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

    def __init__(
        self, worker: Worker, pool: str, environment: WorkerEnvironment, database: URL | None, proxy: Proxy | None
    ) -> None:
        self.worker: Worker = worker
        self.pool: str = pool
        self.environment: WorkerEnvironment = environment
        self.database: Any = database  # None if it is not known
        self.proxy: Any = proxy  # Between the worker and its database; None if there is none
        self.replies: ReplyList = ReplyList(environment.reply_url, environment.reply_key)
        self.sent: dict[str, Sent] = {}
        self.unknown: list[Reply] = []  # Replies to tasks that were not sent here
        self._client: Any = Celery("client", set_as_current=False)
        self._client.conf.update(environment.celery_settings())

    @cached_property
    def _engine(self) -> Engine:
        return create_engine(self.database, poolclass=NullPool, isolation_level="AUTOCOMMIT")

    def close(self) -> None:
        """Close the connections to the broker."""
        self.replies.close()
        self._client.close()

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
    application_name: str = "", used_in_main: bool = False, theirs: URL | None = None, **options: Any,
) -> Iterator[AnyLoadWorker]:  # fmt: skip
    """Start a worker with a database and a queue of its own; all are gone when the block ends.

    Args:
        kind: LoadWorker, or a class derived from it.
        proxied: Makes the proxy through which the worker reaches its database.
        application_name: Of the worker's sessions on PostgreSQL.
        theirs: The database of an app of somebody else's, if it is known: no other is made for one.
        options: Of `running_worker`.
    Raises:
        WorkerError: It ended, or was not ready in time.
    """
    run, broker = given.run, given.broker
    name = f"{name or f'{pool}-{pattern}'}-{uuid.uuid4().hex[:6]}"
    with ExitStack() as stack:
        database, proxy = theirs, None
        if "app" not in options and given.server:
            database = stack.enter_context(given.server.fresh_database(run, name.replace("-", "_")))
            create_tables(database, accounts)
            proxy = stack.enter_context(proxied(database)) if proxied else None
        url = proxy.url if proxy else database
        if url and application_name:
            url = url.update_query_dict({"application_name": application_name})
        address = url.render_as_string(hide_password=False) if url else ""
        queue = queue or f"celery-alchemy-{run.id}-{name}"
        environment = WorkerEnvironment(address, broker.url, broker.reply_url, queue, pattern, used_in_main)
        stack.enter_context(queue_of(run, environment))
        worker = stack.enter_context(
            running_worker(run, environment, pool=pool, concurrency=concurrency, name=name, **options)
        )
        yield stack.enter_context(contextlib.closing(kind(worker, pool, environment, database, proxy)))


OWN_APP = "celery_alchemy.loadtests.tasks.app"
REPORTING = "celery_alchemy.loadtests.reporting"
START_S = 45.0
# Warm shutdown finishes the running tasks; cold shutdown drops them. A worker with a broken session can ignore both.
STOP_STEPS = (StopStep(signal.SIGTERM, 15.0), StopStep(signal.SIGQUIT, 5.0))


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker that is ready, and what it said of itself."""

    process: ChildProcess
    start_s: float  # Seconds from the start of the process until it was ready
    pid: int  # Of its main process
    strategy: str  # Name of the session strategy in force
    reason: str  # Why that one
    max_connections: int | None
    """The most connections it announces to open, all its pool processes together; None if it knows no bound."""

    @property
    def alive(self) -> bool:
        """Whether the main process still runs."""
        return self.process.exit_code is None


@contextmanager
def running_worker(
    run: RunDirectory, environment: WorkerEnvironment, *, pool: str, concurrency: int, strategy: str | None = None,
    name: str = "", app: str = OWN_APP, app_environ: Mapping[str, str] | None = None,
    start_timeout_s: float = START_S, stop_steps: Sequence[StopStep] = STOP_STEPS,
) -> Iterator[Worker]:  # fmt: skip
    """Start a worker, yield it when it is ready, stop it when the block ends.

    Args:
        pool: Worker pool, as in `celery worker --pool`.
        concurrency: Pool processes, threads or greenlets; solo ignores it.
        strategy: Session strategy to insist on; None leaves the choice to the worker.
        name: Of this worker among those of the run; the worker pool's by default.
        app: As in `celery -A`; another one than ours is told to load `reporting`, and to consume our queue.
        app_environ: What another app than ours needs besides the present environment.
    Raises:
        WorkerError: It ended, or was not ready in time.
    """
    name = name or pool
    arguments = [f"--pool={pool}", f"--concurrency={concurrency}"]
    arguments += [f"--session-strategy={strategy}"] if strategy else []
    arguments += [f"--include={REPORTING}", f"--queues={environment.queue}"] if app != OWN_APP else []
    command = worker_command(app, *arguments, hostname=f"{name}@%h")
    if app == OWN_APP and (theirs := PATTERNS[environment.pattern].worker):
        command = [sys.executable, *theirs, str(concurrency)]
    if app == OWN_APP:
        # The caller's own settings must not change what is measured.
        own = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY", "LOADTEST"))}
        environ = {**own, **environment.to_environ()}
    else:
        told = {REPLY_URL: environment.reply_url, READY_KEY: environment.ready_key}
        environ = {**os.environ, **(app_environ or {}), **told}
    # What a worker that is killed leaves behind is removed with the run.
    environ = with_package({**environ, "TMPDIR": str(run.path)})
    started = time.monotonic()
    # Celery looks for modules in the directory it runs in: a strategy of the caller's own is found there.
    with child_process(run, f"worker-{name}", command, environ=environ, steps=stop_steps, cwd=Path.cwd()) as process:
        with contextlib.closing(ReplyList(environment.reply_url, environment.ready_key)) as announcements:
            message, *_ = process.when_ready(
                lambda: list(announcements.pop(timeout_s=0.25)), f"The {pool} worker", start_timeout_s, WorkerError
            )
        yield Worker(process, time.monotonic() - started, **json.loads(message))


def worker_command(app: str, *arguments: str, hostname: str, loglevel: str = "INFO") -> list[str]:
    """Return the command of a worker that talks to no other worker.

    Args:
        arguments: The worker pool among them, as `--pool=...`: Celery patches for gevent and eventlet only where it
            recognises the option.
    """
    return [
        *(sys.executable, "-m", "celery", "-A", app, "worker", *arguments),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        *(f"--hostname={hostname}", f"--loglevel={loglevel}"),
    ]
