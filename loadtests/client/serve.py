"""What a Locust run needs beside it: services and a worker, or the events of a worker that is there already.

A process of its own, because Locust monkey-patches the process it runs in, and because this one ends, with everything
it started, when its stdin closes: also if Locust is killed.

    {"start": {"workload": ..., "worker_pool": ..., ...}}    services and a worker; answered with where they are
    {"start": {"app": ..., "task": ..., "events": true}}     the worker of somebody else's app, which stays as it was
    {"finish": {"tasks": N}}                                 the end: what to say, and whether all is well
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from celery import Celery
from celery.app.utils import find_app as celery_find_app
from celery.utils.imports import cwd_in_path

from ..bench import checks
from ..bench.cells import Bench, RunningCell
from ..bench.results import Arm, Verdict
from ..bench.rows import TaskRow, parse_rows
from ..errors import LoadTestError
from ..services.databases import connect_server, parse_database_url
from ..services.harness import services
from ..services.sampler import Sampler
from .lines import answer_lines, leave_on_signals

SETTLE_S, REPLY_S = 2.0, 3.0


def _rows(directory: Path) -> Iterator[TaskRow]:
    for path in directory.glob("rows-*.csv"):
        # A Locust process that was killed leaves half a row at the end.
        with path.open(newline="") as file, contextlib.suppress(ValueError, csv.Error):
            yield from parse_rows(file)


def find_app(name: str) -> Any:
    """Return the Celery app, as `celery -A` finds it.

    Raises:
        LoadTestError: There is none of this name.
    """
    with cwd_in_path():
        try:
            app = celery_find_app(name)
        except Exception as error:
            # It runs the user's module.
            raise LoadTestError(f"--app: {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(app, Celery):
        raise LoadTestError(f"--app: {name!r} is not a Celery app but a {type(app).__name__}.")
    return app


def require_task(app: Any, name: str, task: str) -> None:
    """Ask the running workers for a task.

    Raises:
        LoadTestError: No worker answers, or none knows the task.
    """
    try:
        answers: dict[str, list[str]] = app.control.inspect(timeout=REPLY_S).registered() or {}
    except OSError as error:
        raise LoadTestError(f"The broker of {name} cannot be reached: {error}") from error
    if not answers:
        raise LoadTestError(
            f"No worker of {name} answered within {REPLY_S:g} s: start one with `celery -A {name} worker`, "
            "with worker_enable_remote_control left on."
        )
    known = {entry.split()[0] for entries in answers.values() for entry in entries}
    if task not in known:
        near = difflib.get_close_matches(task, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"It knows: {', '.join(sorted(known))}."
        raise LoadTestError(f"--task: no worker of {name} knows {task!r}. {hint}")


@contextmanager
def task_events(app: Any) -> Iterator[list[str]]:
    """Have the running workers send task events during the block; yield those that did not before."""
    answers: list[dict[str, dict[str, str]]] = app.control.enable_events(reply=True, timeout=REPLY_S) or []
    told = {worker: reply.get("ok") for answer in answers for worker, reply in answer.items()}
    # A worker that sends them anyway answers "task events already enabled".
    switched = [worker for worker, reply in told.items() if reply == "task events enabled"]
    try:
        yield switched
    finally:
        if switched:
            with contextlib.suppress(OSError):
                app.control.disable_events(destination=switched, reply=True, timeout=REPLY_S)


class Helper:
    """What is there until the end of stdin."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._cell: RunningCell | None = None
        self._sampler: Sampler | None = None  # Of the one database whose connections are counted

    def execute(self, command: dict[str, Any]) -> dict[str, Any]:
        """Execute one command, and return its answer.

        Raises:
            LoadTestError: Something does not start.
        """
        match command:
            case {"start": wanted}:
                return self._watch(**wanted) if "app" in wanted else self._start(**wanted)
            case {"finish": {"tasks": tasks}}:
                lines, verdicts = self._seen(), self._finish(tasks)
                for one in verdicts:
                    detail = f": {one.detail}" if one.detail else ""
                    lines.append(f"{'ok    ' if one.passed else 'BROKEN'} {one.name}{detail}")
                return {"lines": lines, "right": all(one.passed for one in verdicts)}
        raise ValueError("The command is none of: start, finish.")

    def _start(
        self, workload: str, worker_pool: str, concurrency: int, strategy: str | None, pattern: str,
        database_url: str | None, broker_url: str | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Start services and a worker: a cell of the benchmark whose load comes from elsewhere."""
        found = self._stack.enter_context(services(database_url, broker_url))
        assert found.server is not None
        arm = Arm(worker_pool, concurrency, pattern, strategy or "")
        self._cell = cell = RunningCell(Bench(found.run, found.server, found.broker), arm, workload)
        self._stack.callback(cell.close)
        cell.start()
        if cell.worker is None:
            raise LoadTestError(cell.failed_start)
        cell.sampler = self._sampler = self._stack.enter_context(Sampler(found.server.url, [cell.connections_name]))
        ready = cell.worker
        why = f", strategy {ready.strategy} ({ready.reason})" if ready.strategy else ""
        described = (
            f"Worker {cell.worker_pid}: {worker_pool}, concurrency {concurrency}, pattern {pattern}{why}; "
            f"workload {workload}"
        )
        labels = [found.server.label, found.broker.label]
        return {**cell.target, "rows_directory": str(found.run.path), "described": [*labels, described]}

    def _watch(self, app: str, task: str, events: bool, database_url: str | None) -> dict[str, Any]:
        """Look at the worker of somebody else's app; switch the events on that it does not send."""
        found = find_app(app)
        require_task(found, app, task)
        switched = self._stack.enter_context(task_events(found)) if events else []
        if database_url:
            url = connect_server(parse_database_url(database_url), "--database-url").url
            self._sampler = self._stack.enter_context(Sampler(url, [str(url.database)]))
        said = f" Task events were switched on for this run: {', '.join(switched)}." if switched else ""
        return {"described": [f"Sending {task} to the running worker of {app}.{said}"]}

    def _seen(self) -> list[str]:
        """Return what was seen of the connections."""
        peak = max((one.total for one in self._sampler.peaks.values()), default=0) if self._sampler else 0
        promised = self._cell.worker.max_connections if self._cell and self._cell.worker else None
        bound = f" of {promised} promised" if promised is not None else ""
        return [f"Connections: {peak} at most{bound}."] if peak else []

    def _finish(self, tasks: int) -> list[Verdict]:
        """Check the connections, and of a worker of ours the tasks, if this machine knows them all; stop it."""
        cell = self._cell
        if cell is None:
            if self._sampler is None:
                return []
            (database,) = self._sampler.peaks
            left = self._sampler.settle(database, idle_in_transaction=0, within_s=SETTLE_S)
            return checks.check_connections(0, None, left.idle_in_transaction, None)[:1]
        cell.rows = list(_rows(cell.bench.run.path))
        verdicts = cell.check()
        if len(cell.rows) != tasks:
            # Load generators on other machines keep their rows: what the database says by itself can be checked.
            unchecked = f"not checked: {len(cell.rows)} of {tasks} tasks are known here"
            kept = (checks.TOTAL, checks.BALANCES, checks.IDLE, checks.PROMISE)
            verdicts = [verdict for verdict in verdicts if verdict.name in kept]
            verdicts.append(Verdict(checks.ANSWERED, True, unchecked))
        return [*verdicts, *cell.stop()]


def main() -> None:
    """Run as `python -m celery_alchemy.loadtests.client.serve`."""
    leave_on_signals()
    with ExitStack() as stack:
        answer_lines(sys.stdin, Helper(stack).execute)


if __name__ == "__main__":
    main()
