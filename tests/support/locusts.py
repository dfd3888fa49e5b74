"""Locust in processes of its own, as its users start it, and workers for it to load."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL

from celery_alchemy.loadtests.bench.cells import COMMAND
from celery_alchemy.loadtests.bench.rows import TaskRow
from celery_alchemy.loadtests.services.databases import create_tables, database_server
from celery_alchemy.loadtests.services.environment import Broker, WorkerEnvironment, broker, queue_of
from celery_alchemy.loadtests.services.guard import with_package
from celery_alchemy.loadtests.services.harness import Worker, running_worker
from celery_alchemy.loadtests.services.rundir import RunDirectory, run_directory
from celery_alchemy.loadtests.tasks.workloads import ACCOUNTS

LOCUSTFILE = Path(__file__).parents[2] / "loadtests" / "locustfile.py"
RUN_S = 90


@dataclass(frozen=True)
class Bank:
    """A worker that runs our workloads."""

    run: RunDirectory
    broker: Broker
    environment: WorkerEnvironment
    worker: Worker

    @property
    def arm(self) -> dict[str, str]:
        return {
            "arm": "bank",
            "broker_url": self.environment.broker_url,
            "reply_url": self.environment.reply_url,
            "queue": self.environment.queue,
        }

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Stop the worker during the block, as a long collection or a swapping machine would."""
        os.kill(self.worker.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.worker.process.pid, signal.SIGCONT)


@contextmanager
def bank(server: URL) -> Iterator[Bank]:
    """Give a threads worker with a database and a broker of its own."""
    with ExitStack() as stack:
        run = stack.enter_context(run_directory())
        database = stack.enter_context(database_server(run, server.render_as_string(hide_password=False)))
        queue = stack.enter_context(broker(run))
        url = stack.enter_context(database.fresh_database(run, "bank"))
        create_tables(url, ACCOUNTS)
        environment = WorkerEnvironment(
            url.render_as_string(hide_password=False), queue.url, queue.reply_url, f"bank-{run.id}"
        )
        stack.enter_context(queue_of(run, environment))
        worker = stack.enter_context(running_worker(run, environment, pool="threads", concurrency=4))
        yield Bank(run, queue, environment, worker)


class Generator:
    """The load generator, spoken to as a program speaks to it."""

    def __init__(self) -> None:
        self.rows: list[TaskRow] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", *COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=with_package(os.environ),
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        self.send(**command)
        return self.answer()

    def send(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        self.rows += [TaskRow(*row) for row in answer.pop("rows", ())]
        return answer

    def close(self) -> int:
        """Close its stdin, which is to end it; return its exit code."""
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                return self._process.wait(15)
            finally:
                self._process.kill()


def locust(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Locust to its end; standard error is part of the output."""
    return subprocess.run(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_S,
        check=False,
        **with_environ(options),
    )


@contextmanager
def running_locust(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start Locust in a process group of its own; whatever is left of it is killed when the block ends."""
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **with_environ(options),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)


def command(*arguments: str) -> Sequence[str]:
    return [sys.executable, "-m", "locust", *arguments]


def with_environ(options: dict[str, Any]) -> dict[str, Any]:
    environ = {name: value for name, value in os.environ.items() if name not in {"DATABASE_URL", "BROKER_URL"}}
    return {**options, "env": {**with_package(environ), **options.get("env", {})}}


def wait_for_line(process: subprocess.Popen[str], text: str, within_s: float = 60) -> str:
    """Read the output up to a line with this text, and return the line."""
    assert process.stdout is not None
    deadline = time.monotonic() + within_s
    seen = []
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        if text in line:
            return line
        if not line:
            break
        seen.append(line)
    raise AssertionError(f"{text!r} was not printed:\n{''.join(seen)}")
