"""Requests that have ended, whose messages the outbox need not keep: some at a time, beside the tasks."""

from __future__ import annotations

import asyncio
import logging
import os
import threading

from ...strategies.features import outbox_kept
from ...strategies.features.completed import Key
from ...strategies.interrupts import is_interrupt
from ..apps import Served
from .kept import resend_s
from .sender import in_transaction, table_of

logger: logging.Logger = logging.getLogger(__name__)

PAUSE_S = 5.0
"""From a request's end to when its row is deleted, at most. A process that is killed in between leaves the rows: their
messages are sent once more, and do nothing."""
WAITS_S = 5.0
"""The worker's end waits so long for what is being deleted."""


class Received:
    """The requests of this process whose rows are still to be deleted, of one database.

    Args:
        db: Of the outbox.
    """

    def __init__(self, db: Served) -> None:
        self._db = db
        self._lock = threading.Lock()
        self._dropping = threading.Lock()
        self._pid = os.getpid()  # those of the parent process are its own
        self._keys: list[Key] = []
        self._timer: threading.Timer | None = None

    def is_here(self) -> bool:
        """Tell whether this is the process that they have ended in."""
        return self._pid == os.getpid()

    def add(self, key: Key) -> None:
        """The request with this key has ended."""
        with self._lock:
            self._keys.append(key)
            if self._timer is None:
                self._timer = threading.Timer(min(PAUSE_S, resend_s(self._db) / 4), self.drop)
                self._timer.name = "celery-alchemy-received"
                self._timer.daemon = True
                self._timer.start()

    def drop(self) -> None:
        """Delete the rows of what has been added."""
        if not self.is_here():
            return
        # At the worker's end the timer may be at it, on an event loop that is about to be stopped.
        alone = self._dropping.acquire(timeout=WAITS_S)
        try:
            self._drop()
        finally:
            if alone:
                self._dropping.release()

    def _drop(self) -> None:
        with self._lock:
            keys, self._keys = self._keys, []
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        if not keys:
            return
        try:
            in_transaction(self._db, lambda session: outbox_kept.drop_of(session, table_of(self._db), keys))
        except (Exception, asyncio.CancelledError) as error:  # of a database, a driver, an event loop that is over
            if isinstance(error, asyncio.CancelledError | RuntimeError):
                with self._lock:  # the worker ends, its event loop first: it looks once more
                    self._keys += keys
            elif is_interrupt(error):
                raise
            logger.warning("%d tasks have ended, and may be sent once more by the outbox: %r", len(keys), error)


def received(db: Served) -> Received:
    """Return what takes the requests that have ended in this process."""
    found: Received | None = db.received
    if found is None or not found.is_here():
        with db.lock:
            found = db.received
            if found is None or not found.is_here():
                found = db.received = Received(db)
    return found
