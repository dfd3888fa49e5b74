"""What wakes a sender at once when there is something to send: PostgreSQL's LISTEN. Elsewhere it only waits."""

from __future__ import annotations

import contextlib
import logging
import select
from collections.abc import Callable
from time import monotonic
from typing import Any

from sqlalchemy import text
from sqlalchemy.engine import Connection, Engine

from .outbox import CHANNEL

logger: logging.Logger = logging.getLogger(__name__)

SLICE_S = 0.5
"""So long a sender takes to see that it is to end."""


class Wakeup:
    """Waits until something is written into the outbox, or for a time. Keeps one connection of its own, outside the
    connection pool, where the database tells.

    Args:
        engine: Returns the Engine of the outbox's database.
        wait: Waits for so many seconds; a thread's event's `wait`, say.
        listens: False: connections are not for LISTEN; behind a pooler each transaction may get another.
    """

    def __init__(self, engine: Callable[[], Engine], wait: Callable[[float], object], *, listens: bool = True) -> None:
        self._engine, self._wait = engine, wait
        self._connection: Connection | None = None
        self._listens = listens
        """False: this database, or its driver, tells nobody."""

    def wait(self, seconds: float, stopping: Callable[[], bool] = lambda: False) -> bool:
        """Wait for up to so many seconds; return whether there is something to send.

        Args:
            stopping: Asked twice a second: True ends it.
        """
        until = monotonic() + seconds
        if not self._listen():
            self._wait(seconds)
            return False
        try:
            while not stopping() and (left_s := until - monotonic()) > 0:
                if self._told(min(left_s, SLICE_S)):
                    return True
        except Exception as error:
            logger.info("The connection that listens for the outbox is lost: %s", error)
            self.close()
        return False

    def listen(self) -> None:
        """Begin to listen: what is written from now on, `wait` tells, before it has waited at all."""
        self._listen()

    def _listen(self) -> bool:
        if self._connection is not None or not self._listens:
            return self._connection is not None
        try:
            engine = self._engine()
            self._listens = engine.dialect.name == "postgresql" and engine.dialect.driver in _TOLD
            if self._listens:
                connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
                connection.detach()
                connection.execute(text(f'LISTEN "{CHANNEL}"'))
                self._connection = connection
        except Exception as error:
            logger.info("The outbox cannot listen now, and looks from time to time: %s", error)
        return self._connection is not None

    def _told(self, seconds: float) -> bool:
        assert self._connection is not None
        driver_connection = self._connection.connection.dbapi_connection
        return _TOLD[self._connection.dialect.driver](driver_connection, seconds)

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()


def _psycopg(connection: Any, seconds: float) -> bool:
    return any(True for _ in connection.notifies(timeout=seconds, stop_after=1))


def _psycopg2(connection: Any, seconds: float) -> bool:
    if not connection.notifies:
        select.select([connection], [], [], seconds)
        connection.poll()
    found = bool(connection.notifies)
    connection.notifies.clear()
    return found


#: By driver: waits for a NOTIFY for so many seconds, and tells whether there was one.
_TOLD: dict[str, Callable[[Any, float], bool]] = {"psycopg": _psycopg, "psycopg2": _psycopg2}
