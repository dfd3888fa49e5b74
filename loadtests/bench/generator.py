"""The load generator as the orchestrator sees it: a process that takes one command after the other.

It is monkey-patched, so it is never in this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from ..client.lines import LineProcess
from ..services.processes import deferred_signals
from ..services.rundir import RunDirectory
from .rows import TaskRow

# gevent has to patch the standard library before this package, Celery and SQLAlchemy have imported it.
COMMAND = ("gevent.monkey", "--module", "celery_alchemy.loadtests.client.generator")
ANSWER_S = 180.0  # On top of what a load is meant to take: a backlog is worked off for up to two minutes
STOP_S = 10.0


class Generator(LineProcess):
    """One long-lived gevent process."""

    def __init__(self, run: RunDirectory) -> None:
        super().__init__("The load generator", "-m", *COMMAND, log=run.path / "generator.log")

    def slice(self, *, within_s: float, **command: Any) -> tuple[dict[str, Any], list[TaskRow]]:
        """Put an arm under load, and return the summary and a row for each task.

        Args:
            within_s: How long the load itself can take.
        """
        answer = self.ask(within_s + ANSWER_S, slice=command)
        return answer, [TaskRow(*row) for row in answer.pop("rows")]

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
