"""The load generator as the orchestrator sees it: a process that takes one command after the other.

It is monkey-patched, so it is never in this process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from ..client.lines import LineProcess
from ..services.processes import deferred_signals
from ..services.rundir import RunDirectory
from .rows import TaskRow, parse_rows

# gevent has to patch the standard library before this package, Celery and SQLAlchemy have imported it.
COMMAND = ("gevent.monkey", "--module", "celery_alchemy.loadtests.client.generator", "--rows")
ANSWER_S = 180.0  # On top of what a load is meant to take: a backlog is worked off for up to two minutes
STOP_S = 10.0


class Generator(LineProcess):
    """One long-lived gevent process."""

    def __init__(self, run: RunDirectory) -> None:
        self._rows_path, self._offset = run.path / "rows.csv", 0
        self._rows_path.touch()
        super().__init__("The load generator", *COMMAND, str(self._rows_path), log=run.path / "generator.log")

    def slice(self, *, within_s: float, **command: Any) -> tuple[dict[str, Any], list[TaskRow]]:
        """Put an arm under load, and return the summary and a row for each task.

        Args:
            within_s: How long the load itself can take.
        """
        answer = self.ask(within_s + ANSWER_S, slice=command)
        with self._rows_path.open(newline="") as file:
            file.seek(self._offset)
            rows = list(parse_rows(file))
            self._offset = file.tell()
        return answer, rows

    def forget_rows(self) -> None:
        """Throw the rows away that were returned already."""
        os.truncate(self._rows_path, 0)
        self._offset = 0

    @classmethod
    @contextmanager
    def running(cls, run: RunDirectory) -> Iterator[Self]:
        """Start it, and end it when the block ends."""
        with deferred_signals():
            generator = cls(run)
            guarded = run.guard.watch_process(generator.pid)
        try:
            yield generator
        finally:
            generator.stop(STOP_S)
            run.guard.forget(guarded)
