"""Running a task's body again, in a fresh transaction, where the server has rolled it back because of another one."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ..strategies.engines.transient import is_conflict
from . import apps

if TYPE_CHECKING:
    from ..strategies.unit_of_work import UnitOfWork
    from .task import DatabaseTask

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 1.0


class Lost(Exception):
    """A body whose transaction lost against another one, with nothing committed; its cause is the database's error."""


class Attempt(Protocol):
    """Runs the body in a unit of work of its own, and ends that."""

    def __call__(self, *, first: bool, last: bool) -> Any:
        """Return what the body returns; raise `Lost` where it may run again, which the last attempt may not."""


def allowed(task: DatabaseTask) -> int:
    """Return how often the body of `task` may run again: as the task says, else the setting."""
    own = task.isolation_retries
    if own is not None:
        return own
    db = apps.find(task.app)
    return db.settings.isolation_retries if db is not None else 0


def may_run_again(error: BaseException | None, unit: UnitOfWork) -> bool:
    """Tell whether the body may run again after `error`: the server has undone all of it, and nothing was committed, by
    the body itself or on another database."""
    return is_conflict(error) and not any(part.has_committed for part in unit.all_parts)


def run_again(run: Attempt, begin_again: Callable[[], None], task: DatabaseTask, retries: int) -> Any:
    """Return what `run` returns, called up to `retries` times more while its transaction loses against another one.

    Between two attempts nothing is held, and the pause is random, up to twice as long each time: two transactions that
    met once must not meet again.

    Args:
        begin_again: Makes the request look as if its body had not begun.
    """
    for attempt in range(retries):
        try:
            return run(first=attempt == 0, last=False)
        except Lost as lost:
            pause_s = random.uniform(0, min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S))  # noqa: S311
            logger.info(
                "%s: attempt %s of %s lost its transaction to another one (%s); again in %.0f ms",
                task.name, attempt + 1, retries + 1, type(lost.__cause__).__name__, pause_s * 1000,
            )  # fmt: skip
        time.sleep(pause_s)
        begin_again()
    return run(first=False, last=True)
