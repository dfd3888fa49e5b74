"""What a Locust run needs beside it: services and a worker, or the events of a worker that is there already.

A process of its own, because Locust monkey-patches the process it runs in, and because this one ends, with everything
it started, when its stdin closes: also if Locust is killed.

    stdin    one line of JSON: `OwnWorker` or `TheirWorker`; then `{"finish": {"tasks": N}}`, or the end
    stdout   {"ready": {...}} or {"error": "..."}; {"sample": {...}} every second; after finish, {"end": {...}}
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import select
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

from sqlalchemy import URL

from .bench import checks
from .bench.results import Verdict
from .brokers import queue_of
from .databases import DatabaseServer, connect_server, create_tables, parse_database_url
from .environment import WorkerEnvironment
from .errors import LoadTestError
from .patterns import OURS
from .rows import TaskRow, parse_rows
from .rundir import RunDirectory, run_directory
from .sampler import Observer, Sampler
from .services import broker, database_server
from .worker import Worker, running_worker
from .workloads import ACCOUNTS, WORKLOADS

SAMPLE_S = 1.0
SETTLE_S = 2.0
BALANCES = 2


@dataclass(frozen=True, slots=True)
class OwnWorker:
    """Services and a worker to start."""

    workload: str
    pool: str
    concurrency: int
    strategy: str | None = None
    """Session strategy to insist on; None leaves the choice to the worker."""
    pattern: str = OURS
    database_url: str | None = None
    """A server to use instead of an embedded one."""
    broker_url: str | None = None
    """Likewise."""


@dataclass(frozen=True, slots=True)
class TheirWorker:
    """A worker that runs already, of somebody else's app."""

    app: str
    """As in `celery -A`."""
    task: str
    events: bool
    """Whether replies come through Celery's events, which are to be switched on."""
    database_url: str | None = None
    """What its connections are counted on; None if nobody said."""


class Setup(ABC):
    """What is there until the end of stdin."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    @property
    @abstractmethod
    def ready(self) -> dict[str, Any]:
        """What Locust has to know."""

    @abstractmethod
    def sample(self) -> dict[str, Any]:
        """Return what can be seen now."""

    @abstractmethod
    def finish(self, tasks: int) -> list[Verdict]:
        """End it, and return what held and what did not.

        Args:
            tasks: How many Locust has sent.
        """


class OwnSetup(Setup):
    """Services and a worker of our own."""

    def __init__(self, stack: ExitStack, run: RunDirectory, wanted: OwnWorker) -> None:
        super().__init__(stack)
        self._wanted, self._run = wanted, run
        self._server: DatabaseServer = stack.enter_context(database_server(run, wanted.database_url))
        queue = stack.enter_context(broker(run, wanted.broker_url))
        self._database: URL = stack.enter_context(self._server.fresh_database(run, "locust"))
        create_tables(self._database, ACCOUNTS)
        self._environment = WorkerEnvironment(
            database_url=self._database.render_as_string(hide_password=False),
            broker_url=queue.url,
            reply_url=queue.reply_url,
            queue=f"celery-alchemy-{run.id}",
            pattern=wanted.pattern,
        )
        stack.enter_context(queue_of(run, self._environment))
        self._services = [self._server.label, queue.label]
        name = str(self._database.database)
        self._sampler = stack.enter_context(Sampler(self._server.url, [name]))
        self._observer = Observer(self._server.url, name)
        stack.callback(self._observer.close)
        self._worker: Worker = stack.enter_context(
            running_worker(
                run, self._environment, pool=wanted.pool, concurrency=wanted.concurrency, strategy=wanted.strategy
            )
        )

    @property
    def ready(self) -> dict[str, Any]:
        ready = self._worker.ready
        return {
            "broker_url": self._environment.broker_url,
            "reply_url": self._environment.reply_url,
            "queue": self._environment.queue,
            "rows_directory": str(self._run.path),
            "services": self._services,
            "worker_pid": self._worker.process.pid,
            "strategy": ready.strategy,
            "reason": ready.reason,
            "promised": ready.max_connections,
            "start_s": round(self._worker.start_s, 2),
        }

    def sample(self) -> dict[str, Any]:
        name = str(self._database.database)
        now, peak = self._observer.snapshots()[name], self._sampler.peaks[name]
        return {
            "connections": now.total,
            "idle_in_transaction": now.idle_in_transaction,
            "peak_connections": peak.total,
            "peak_idle_in_transaction": peak.idle_in_transaction,
            "promised_connections": self._worker.ready.max_connections,
            "worker_alive": self._worker.alive,
        }

    def finish(self, tasks: int) -> list[Verdict]:
        name = str(self._database.database)
        left = self._observer.settle(name, idle_in_transaction=0, within_s=SETTLE_S)
        facts = checks.ConnectionFacts(
            peak=self._sampler.peaks[name].total,
            promised=self._worker.ready.max_connections,
            idle_in_transaction=left.idle_in_transaction,
            sampling_error=self._sampler.error,
        )
        verdicts = [*self._check_tasks(tasks), *checks.check_connections(facts)]
        verdicts += [checks.stop(self._worker), checks.check_end(self._observer, name)]
        return verdicts

    def _check_tasks(self, tasks: int) -> list[Verdict]:
        workload, rows = WORKLOADS[self._wanted.workload], list(_rows(self._run.path))
        if len(rows) == tasks:
            return [
                *checks.check_answers(rows, workload),
                *checks.check_sessions(rows),
                *checks.check_ledger(self._database, rows, workload),
            ]
        # Load generators on other machines keep their rows: what the database says by itself can be checked.
        return [
            *checks.check_ledger(self._database, [], workload)[:BALANCES],
            Verdict("every task was answered", True, f"not checked: {len(rows)} of {tasks} tasks are known here"),
        ]


class TheirSetup(Setup):
    """The worker of somebody else's app, which stays as it was."""

    def __init__(self, stack: ExitStack, wanted: TheirWorker) -> None:
        super().__init__(stack)
        from .their_workers import find_app, require_task, task_events

        app = find_app(wanted.app)
        require_task(app, wanted.app, wanted.task)
        self._workers = stack.enter_context(task_events(app)) if wanted.events else []
        self._observer: Observer | None = None
        if wanted.database_url:
            url = parse_database_url(wanted.database_url)
            self._database = str(url.database)
            self._observer = Observer(connect_server(url, "--database-url").url, self._database)
            stack.callback(self._observer.close)
        self._peak = 0

    @property
    def ready(self) -> dict[str, Any]:
        return {"events_enabled": self._workers}

    def sample(self) -> dict[str, Any]:
        if self._observer is None:
            return {}
        now = self._observer.snapshots()[self._database]
        self._peak = max(self._peak, now.total)
        return {
            "connections": now.total,
            "idle_in_transaction": now.idle_in_transaction,
            "peak_connections": self._peak,
        }

    def finish(self, tasks: int) -> list[Verdict]:
        if self._observer is None:
            return []
        left = self._observer.settle(self._database, idle_in_transaction=0, within_s=SETTLE_S).idle_in_transaction
        return [Verdict("no connection was left idle in transaction", not left, f"{left} connections" if left else "")]


def _rows(directory: Path) -> Iterator[TaskRow]:
    for path in directory.glob("rows-*.csv"):
        # A Locust process that was killed leaves half a row at the end.
        with path.open(newline="") as file, contextlib.suppress(ValueError, csv.Error):
            yield from parse_rows(file)


class Commands:
    """Lines of stdin, with a look at the worker while there are none."""

    def __init__(self) -> None:
        self._buffer = b""
        self._ended = False

    def next(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """Return the next command, an empty one if none came in time; None at the end."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if self._ended:
                return None
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([0], [], [], left)[0]:
                return {}
            data = os.read(0, 65536)
            self._ended = not data
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


class Answers:
    """Lines of stdout, for as long as anybody reads them."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **answer: Any) -> None:
        """Write one line."""
        with contextlib.suppress(BrokenPipeError):
            self._file.write(json.dumps(answer) + "\n")
            self._file.flush()

    @classmethod
    def open(cls) -> Self:
        """Take stdout; whatever else is printed goes to stderr."""
        return cls()


def _start(stack: ExitStack, wanted: dict[str, Any]) -> Setup:
    if "app" in wanted:
        return TheirSetup(stack, TheirWorker(**wanted))
    return OwnSetup(stack, stack.enter_context(run_directory()), OwnWorker(**wanted))


def _leave(number: int, _frame: FrameType | None) -> None:
    """Unwind, so that every server and worker is stopped on the way out."""
    sys.exit(128 + number)


def main() -> None:
    """Run as `python -m celery_alchemy.loadtests.serve`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    answers, commands = Answers.open(), Commands()
    with ExitStack() as stack:
        wanted = commands.next()
        if not wanted:
            return
        try:
            setup = _start(stack, wanted)
        except LoadTestError as error:
            answers.send(error=str(error))
            sys.exit(2)
        answers.send(ready=setup.ready)
        while (command := commands.next(SAMPLE_S)) is not None:
            if "finish" in command:
                sample = setup.sample()
                verdicts = setup.finish(command["finish"]["tasks"])
                answers.send(
                    end={
                        "sample": sample,
                        "verdicts": [
                            {"name": verdict.name, "passed": verdict.passed, "detail": verdict.detail}
                            for verdict in verdicts
                        ],
                    }
                )
                return
            answers.send(sample=setup.sample())


if __name__ == "__main__":
    main()
