"""Old rows of completed tasks go a few at a time with new ones, so that the table does not grow for ever."""

from __future__ import annotations

import logging
import random

from sqlalchemy.exc import SQLAlchemyError

from .rows import Rows

logger: logging.Logger = logging.getLogger(__name__)

AFTER_ROWS, PRUNED_AT_ONCE = 100, 200
"""Up to so many old rows are deleted for so many new ones: more than come."""


class Pruning:
    """Counts new rows of a task in this process, and deletes old ones after every hundred.

    It begins anywhere in the first hundred: a pool process may end sooner (`worker_max_tasks_per_child`), and many
    tasks may each write a few rows.

    Args:
        kept_s: Rows that are older than so many seconds are deleted.
    """

    def __init__(self, rows: Rows, kept_s: float) -> None:
        self._rows, self._kept_s = rows, kept_s
        self._new = random.randrange(AFTER_ROWS)  # noqa: S311 - no secret

    def recorded(self) -> None:
        """A row has been written. What goes wrong here is no task's fault, and is tried again later."""
        self._new += 1
        if self._new >= AFTER_ROWS:
            self._new = 0
            try:
                self._rows.prune_some(self._kept_s, PRUNED_AT_ONCE)
            except SQLAlchemyError as error:
                logger.info("Old rows of completed tasks could not be deleted now: %s", error)
