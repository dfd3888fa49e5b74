"""SQLite on an event loop: aiosqlite, which executes in a thread for each connection.

A coroutine that is cancelled leaves the thread at work, and to close the connection waits for it. SQLite itself can be
interrupted: so that comes first. It does not listen while it waits for a lock; then the thread is left alone, and
closes the connection when it is through.

Tried with aiosqlite 0.22.1, SQLAlchemy 2.0.43 and 2.1.9. Private of aiosqlite are `_connection`, the one of sqlite3,
`_execute`, which tells when its thread is through, and `_tx`, what the thread is to do.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from typing import Any

from sqlalchemy.util import await_only

from ..options import DatabaseOptions
from .awaited_sqlite_cursors import StreamCursor, WholeCursor
from .awaiting import Adapted, Awaited, Stream, forwarded
from .base import Connect, Driver
from .sqlite import SQLite, let_go

ASK_EVERY_S = 0.01
GIVE_UP_AFTER_S = 0.5
"""What is not interrupted until then is waiting for a lock."""


class AdaptedSQLite(Adapted):
    """An adapted connection of which as much is known as of one of sqlite3's."""

    dbapi: Any
    celery_alchemy_stuck: bool = False
    """Its thread waits for a lock, and would let who closes it wait too."""
    in_transaction: Any = forwarded("in_transaction")
    total_changes: Any = forwarded("total_changes")
    row_factory: Any = forwarded("row_factory")
    text_factory: Any = forwarded("text_factory")

    @property
    def OperationalError(self) -> Any:  # noqa: N802 - sqlite3's name
        """sqlite3's."""
        return self.dbapi.OperationalError

    def cursor(self, server_side: bool = False) -> WholeCursor:
        """Return a cursor that knows its connection."""
        return StreamCursor(self, self._streams()) if server_side else WholeCursor(self)

    def _streams(self) -> weakref.WeakSet[Any]:
        found: weakref.WeakSet[Any] = self.__dict__.setdefault("celery_alchemy_streams", weakref.WeakSet())
        return found

    def execute(self, operation: str, parameters: Any = ()) -> Any:
        """Execute a statement with a cursor of its own, which is returned; sqlite3 has it too."""
        cursor = self.cursor()
        cursor.execute(operation, parameters)
        return cursor

    def close(self) -> None:
        """Close the connection; one that is stuck is closed when it is through, and not waited for."""
        self._roll_back_first()
        if self.celery_alchemy_stuck:
            self._connection.stop()
        else:
            super().close()  # type: ignore[misc]

    def terminate(self) -> None:
        """Close the connection, whatever it is doing."""
        self._roll_back_first()
        super().terminate()  # type: ignore[misc]

    async def _terminate_graceful_close(self) -> None:
        if self.celery_alchemy_stuck:
            raise TimeoutError
        await super()._terminate_graceful_close()

    def _roll_back_first(self) -> None:
        """Let go of its locks: while an exception, say, still has a cursor, SQLite keeps them after the close."""
        raw = self._connection._connection
        if raw is not None:
            streams = self._streams()
            self._connection._tx.put_nowait((None, lambda: let_go(raw, list(streams))))


class Aiosqlite(Awaited, SQLite):
    """aiosqlite."""

    adapted: type[Adapted] = AdaptedSQLite
    stream_class: type[Stream] | None = None  # its own are closed without waiting

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

    def abandon(self, dbapi_connection: Any) -> None:
        # In a thread without an event loop, to which it would want to tell of the end.
        ending = threading.Thread(target=dbapi_connection.driver_connection.stop)
        ending.start()
        ending.join()

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
