"""Cursors of aiosqlite, in place of SQLAlchemy's: a statement has left nothing behind when its thread is through.

SQLAlchemy's cursors let the thread execute, and then fetch. A coroutine that is cancelled between the two leaves the
statement open. Then the connection, given back, refuses BEGIN IMMEDIATE at once ("database is locked"). Where it was
interrupted, it refuses even ROLLBACK, and keeps its locks after it is closed, until the cursor is collected. These let
the thread do both at once. That saves three of four hops to the thread besides.

Private of aiosqlite are `_conn`, the connection of sqlite3, `_execute`, and `_tx`, what the thread is to do; of
SQLAlchemy's adapted connections `_connection` and `_handle_exception`.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sqlalchemy.util import await_only

from ..interrupts import is_interrupt


class WholeCursor:
    """A cursor that has fetched all rows when it has executed.

    Args:
        connection: The adapted connection.
    """

    __slots__ = ("_rows", "arraysize", "connection", "raw")
    server_side: bool = False

    def __init__(self, connection: Any) -> None:
        self.connection: Any = connection
        """The adapted connection."""
        self.raw: Any = None
        """The cursor of sqlite3; None before the first statement."""
        self.arraysize: int = 1
        """How many rows `fetchmany` returns by default."""
        self._rows: deque[Any] = deque()

    @property
    def description(self) -> Any:
        """The columns of the last statement; None where it has no rows."""
        return self.raw.description if self.raw is not None else None

    @property
    def rowcount(self) -> int:
        """How many rows the last statement has changed; -1 where that is not known."""
        return self.raw.rowcount if self.raw is not None else -1

    @property
    def lastrowid(self) -> int | None:
        """The key of the row that was inserted last."""
        return self.raw.lastrowid if self.raw is not None else None

    def execute(self, operation: str, parameters: Any = None) -> None:
        """Execute a statement, and fetch its rows."""

        def work() -> tuple[Any, Any]:
            raw = self.raw or self.connection._connection._conn.cursor()
            raw.execute(operation, () if parameters is None else parameters)
            return raw, raw.fetchall() if raw.description else ()

        self.raw, rows = self._in_thread(work)
        self._rows = deque(rows)

    def executemany(self, operation: str, parameters: Any) -> None:
        """Execute a statement without rows once for each of `parameters`."""

        def work() -> Any:
            raw = self.raw or self.connection._connection._conn.cursor()
            return raw.executemany(operation, parameters)

        self.raw = self._in_thread(work)
        self._rows = deque()

    def _in_thread(self, work: Callable[[], Any]) -> Any:
        try:
            return await_only(self.connection._connection._execute(work))
        except Exception as error:
            if is_interrupt(error):
                raise
            return self.connection._handle_exception(error)  # raises it as one of sqlite3's

    def fetchone(self) -> Any:
        """Return the next row; None where there is none."""
        return self._rows.popleft() if self._rows else None

    def fetchmany(self, size: int | None = None) -> Sequence[Any]:
        """Return the next rows."""
        return [self._rows.popleft() for _ in range(min(size or self.arraysize, len(self._rows)))]

    def fetchall(self) -> Sequence[Any]:
        """Return the rows that are left."""
        rows, self._rows = list(self._rows), deque()
        return rows

    def __iter__(self) -> Iterator[Any]:
        while self._rows:
            yield self._rows.popleft()

    def setinputsizes(self, *_: Any) -> None:
        """SQLite knows none."""

    def close(self) -> None:
        """Forget the rows; in the thread nothing is open."""
        self._rows.clear()

    async def _async_soft_close(self) -> None:
        """SQLAlchemy 2.1 asks for it, where the rows are fetched outside of a greenlet."""


class StreamCursor(WholeCursor):
    """A cursor that fetches rows when it is asked for them.

    Args:
        streams: It is in this set while its statement may be open; only the thread looks there.
    """

    __slots__ = ("_streams",)
    server_side = True

    def __init__(self, connection: Any, streams: weakref.WeakSet[Any]) -> None:
        super().__init__(connection)
        self._streams = streams

    def execute(self, operation: str, parameters: Any = None) -> None:
        """Execute a statement."""

        def work() -> Any:
            raw = self.raw or self.connection._connection._conn.cursor()
            self._streams.add(raw)
            return raw.execute(operation, () if parameters is None else parameters)

        self.raw: Any = self._in_thread(work)

    def fetchone(self) -> Any:
        return self._in_thread(self.raw.fetchone)

    def fetchmany(self, size: int | None = None) -> Sequence[Any]:
        rows: Sequence[Any] = self._in_thread(lambda: self.raw.fetchmany(size or self.arraysize))
        return rows

    def fetchall(self) -> Sequence[Any]:
        rows: Sequence[Any] = self._in_thread(self.raw.fetchall)
        return rows

    def __iter__(self) -> Iterator[Any]:
        while (row := self.fetchone()) is not None:
            yield row

    def close(self) -> None:
        """Let the thread close it in its turn. Nothing is waited for: SQLAlchemy would take a time limit that strikes
        here for an error in closing, and go on."""
        if self.raw is not None and self.connection._connection._connection is not None:
            self.connection._connection._tx.put_nowait((None, self.raw.close))
