"""Running a task's body again, in a fresh transaction, where the server has rolled it back because of another one."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import replace
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from ..strategies.engines.transient import is_conflict
from ..strategies.hooks import OpenUnit, UnitHook
from .request import Call, RequestRunner, begin_again, is_traced, request_of

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 1.0


class NoteCommits(UnitHook):
    """Notes whether anything of a unit of work was committed, by the task's own code too: then it may not run again."""

    __slots__ = ("committed",)

    def __init__(self) -> None:
        self.committed = False

    def opened(self, unit: OpenUnit, session: Session) -> None:
        def after_commit(session: Session) -> None:
            if not session.in_nested_transaction():  # else a savepoint is released, and nothing is committed
                self.committed = True

        event.listen(session, "after_commit", after_commit)


class IsolatingRunner(RequestRunner):
    """Runs the body up to `retries` times more while its transaction loses against another one.

    Between two attempts nothing is held, and the pause is random, up to twice as long each time: two transactions that
    met once must not meet again.

    Args:
        runner: Runs one attempt.
        retries: How often the body may run again.
    """

    def __init__(self, runner: RequestRunner, retries: int) -> None:
        super().__init__(runner.registry, runner.options, runner.hook_options)
        self._runner = runner
        self._retries = retries

    def run(self, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        # Called like a function, the body may be in a transaction of its caller's.
        if not is_traced(request_of(task)) and self.registry.current_entry() is not None:
            return self._runner.run(call, task, args, kwargs)
        for attempt in range(self._retries):
            runner = self._attempt(first=attempt == 0)
            try:
                return runner.run(call, task, args, kwargs)
            except Exception as error:
                if not runner.goes_on(error):
                    raise
                pause_s = random.uniform(0, min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S))  # noqa: S311
                logger.info(
                    "%s: attempt %s of %s lost its transaction to another one (%s); again in %.0f ms",
                    task.name, attempt + 1, self._retries + 1, type(error).__name__, pause_s * 1000,
                )  # fmt: skip
            time.sleep(pause_s)
            begin_again(task)
        last = self._attempt(first=False)
        last.goes_on = _never
        return last.run(call, task, args, kwargs)

    def inside(self, *args: Any, **kwargs: Any) -> Any:
        """Run hooks and `__call__` as without retries."""
        return self._runner.inside(*args, **kwargs)

    def _attempt(self, *, first: bool) -> RequestRunner:
        note = NoteCommits()
        options = replace(self.options, hooks=(*self.options.hooks, note), extra=(*self.options.extra, note))
        runner = type(self._runner)(self.registry, options, self.hook_options)
        runner.first = first
        runner.goes_on = lambda error: is_conflict(error) and not note.committed
        return runner


def _never(error: BaseException | None) -> bool:
    return False
