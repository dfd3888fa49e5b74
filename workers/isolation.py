"""Running a task's body again, in a fresh transaction, where the server has rolled it back because of another one."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Iterable
from typing import Any

from ..strategies.engines.elsewhere import Attempt, listen
from ..strategies.engines.transient import is_conflict
from .pausing import pause
from .request import Call, RequestRunner, begin_again, is_traced, request_of

logger: logging.Logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 1.0


def prepare_threads(tasks: Iterable[Any], of_all: int) -> None:
    """Listen to SQLAlchemy, in a worker whose processes run tasks at the same time, before any of them runs again.

    Args:
        of_all: The setting `alchemy_isolation_retries`.
    """
    if of_all or any(getattr(task, "isolation_retries", None) for task in tasks):
        listen()


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
            runner, watch = self._copy(first=attempt == 0), Attempt()
            # Whatever was committed meanwhile, by itself, a nested unit of work or an eager task, would be done twice.
            runner.goes_on = functools.partial(_may_go_on, watch)
            try:
                return runner.run(call, task, args, kwargs)
            except Exception as error:
                if not is_conflict(error):
                    raise
                found = watch.found()
                if found is not None:
                    logger.warning(
                        "%s: attempt %s of %s lost its transaction to another one, and does not run again: %s",
                        task.name, attempt + 1, self._retries + 1, found,
                    )  # fmt: skip
                    raise
                pause_s = random.uniform(0, min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S))  # noqa: S311
                logger.info(
                    "%s: attempt %s of %s lost its transaction to another one (%s); again in %.0f ms",
                    task.name, attempt + 1, self._retries + 1, type(error).__name__, pause_s * 1000,
                )  # fmt: skip
            finally:
                watch.end()
            pause(pause_s)
            begin_again(task)
        return self._copy(first=False).run(call, task, args, kwargs)

    def inside(self, *args: Any, **kwargs: Any) -> Any:
        """Run hooks and `__call__` as without retries."""
        return self._runner.inside(*args, **kwargs)

    def _copy(self, *, first: bool) -> RequestRunner:
        runner = type(self._runner)(self.registry, self.options, self.hook_options)
        runner.first = first
        return runner


def _may_go_on(watch: Attempt, error: BaseException | None) -> bool:
    return error is not None and is_conflict(error) and watch.found() is None
