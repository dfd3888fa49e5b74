"""What the body of a task with `exactly_once` commits in a transaction of its own: no row says that it is done."""

from __future__ import annotations

import logging
from typing import Any

from ...strategies.engines.elsewhere import Attempt as Watch
from ...strategies.features.exactly_once import Attempt
from .sends import HELD

logger: logging.Logger = logging.getLogger(__name__)

_warned: set[str] = set()
"""Tasks of which the log says so already."""


def warn_of_commits(attempt: Attempt, watch: Watch, request: Any) -> None:
    """Say, once for each task in a process, that its body has committed something beside its own transaction."""
    if attempt.committed or not watch.has_committed() or attempt.task in _warned:
        return
    if HELD in request.__dict__:  # `retry(throw=False)`, whose message the outbox has
        return
    _warned.add(attempt.task)
    logger.warning(
        "%s has exactly_once, and has committed work in a transaction of its own (`with db.unit_of_work()`, `.apply()` "
        "of another task, a connection of its own). That is not recorded with the task, and is done again when the "
        "task runs again. Do it with self.db, or call the other task like a function. This is said once for each task.",
        attempt.label,
    )
