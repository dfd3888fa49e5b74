"""SQLite on an event loop: aiosqlite, which executes in a thread for each connection.

A coroutine that is cancelled leaves the thread at work, and to close the connection waits for it. SQLite itself can be
interrupted: so that comes first. It does not listen while it waits for a lock; then the thread is left alone, and
closes the connection when it is through.

Tried with aiosqlite 0.22.1 and SQLAlchemy 2.1.9. Private of aiosqlite are `_connection`, the one of sqlite3, and
`_execute`, which tells when its thread is through.
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

from sqlalchemy.util import await_only

from ..options import DatabaseOptions
from .awaiting import Adapted, Awaited, forwarded
from .base import Connect, Driver
from .sqlite import SQLite

ASK_EVERY_S = 0.01
GIVE_UP_AFTER_S = 0.5
"""What is not interrupted until then is waiting for a lock."""


class AdaptedCursor:
    """Comes before SQLAlchemy's own class of adapted cursors."""

    _adapt_connection: Any

    @property
    def connection(self) -> Any:
        """The adapted connection."""
        return self._adapt_connection


class AdaptedSQLite(Adapted):
    """An adapted connection of which as much is known as of one of sqlite3's."""

    dbapi: Any
    celery_alchemy_stuck: bool = False
    """Its thread waits for a lock, and would let who closes it wait too."""
    in_transaction = forwarded("in_transaction")
    total_changes = forwarded("total_changes")
    row_factory = forwarded("row_factory")
    text_factory = forwarded("text_factory")

    @property
    def OperationalError(self) -> Any:  # noqa: N802 - sqlite3's name
        """sqlite3's."""
        return self.dbapi.OperationalError

    def cursor(self, server_side: bool = False) -> Any:
        """Return a cursor that knows its connection."""
        return _cursor_class_of(self._ss_cursor_cls if server_side else self._cursor_cls)(self)  # type: ignore[attr-defined]

    async def _terminate_graceful_close(self) -> None:
        if self.celery_alchemy_stuck:
            raise TimeoutError
        await super()._terminate_graceful_close()


@cache
def _cursor_class_of(base: Any) -> Any:
    return type(base.__name__, (AdaptedCursor, base), {"__slots__": (), "__module__": base.__module__})


class Aiosqlite(Awaited, SQLite):
    """aiosqlite."""

    adapted: type[Adapted] = AdaptedSQLite

    @staticmethod
    def state_of(adapted: Any) -> Any:
        if adapted.driver_connection._connection is None:
            return None  # it is closed
        return SQLite.state_of(adapted)

    def engine_arguments(self, options: DatabaseOptions) -> dict[str, Any]:
        given = options.engine_options
        leave = "pool_reset_on_return" in given or {"poolclass", "pool"} & given.keys()
        return {} if leave else {"pool_reset_on_return": None}  # `settle` does it

    def cancel(self, dbapi_connection: Any, connect: Connect) -> None:
        """Interrupt what is executed, and what its thread was told to execute."""
        await_only(self._interrupt(dbapi_connection))

    async def _interrupt(self, dbapi_connection: Any) -> None:
        raw = dbapi_connection.driver_connection
        if raw._connection is None:
            return
        through = asyncio.ensure_future(raw._execute(bool))
        deadline = asyncio.get_running_loop().time() + GIVE_UP_AFTER_S
        while not through.done():
            if asyncio.get_running_loop().time() > deadline:
                dbapi_connection.celery_alchemy_stuck = True
                through.cancel()
                return
            raw._connection.interrupt()
            await asyncio.wait([through], timeout=ASK_EVERY_S)


DRIVERS: dict[str, Driver] = {"aiosqlite": Aiosqlite()}
