"""Old rows of completed tasks go a few at a time with new ones, so that the table does not grow for ever."""

from __future__ import annotations

import logging

from sqlalchemy.exc import SQLAlchemyError

from .rows import Rows

logger: logging.Logger = logging.getLogger(__name__)

AFTER_ROWS, PRUNED_AT_ONCE = 100, 200
"""After so many new rows of a process up to so many old ones are deleted: more than come."""


class Pruning:
    """Counts new rows, and deletes old ones after every hundred.

    Args:
        kept_s: Rows that are older than so many seconds are deleted.
    """

    def __init__(self, rows: Rows, kept_s: float) -> None:
        self._rows, self._kept_s, self._new = rows, kept_s, 0

    def recorded(self) -> None:
        """A row has been written. What goes wrong here is no task's fault, and is tried again later."""
        self._new += 1
        if self._new >= AFTER_ROWS:
            self._new = 0
            try:
                self._rows.prune_some(self._kept_s, PRUNED_AT_ONCE)
            except SQLAlchemyError as error:
                logger.info("Old rows of completed tasks could not be deleted now: %s", error)
