"""MySQL and MariaDB on an event loop: asyncmy and aiomysql.

Both close their connection when the coroutine that waits for a statement is cancelled, and leave the statement running
on the server. So another connection ends it there: with KILL, not KILL QUERY, for the connection is of no use any more,
and KILL QUERY does nothing where the server has not yet begun the statement.

Tried with asyncmy 0.2.18, aiomysql 0.3.2 and MariaDB 10.11. Private of them are `_connect`, by which aiomysql leaves
its socket open when it is cancelled, `_stream_broken` (asyncmy), `_reader` and `_writer` (aiomysql), the only ones to
know that the server has closed an idle connection, and `_encoders`, `_decoders` and `_cursor_cls` (asyncmy).
"""

from __future__ import annotations

import asyncio
import weakref
from functools import cache
from typing import Any

from sqlalchemy.engine import URL, Engine
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from ..interrupts import is_interrupt
from ..options import DatabaseOptions
from .awaiting import Adapted, Awaited, forwarded
from .base import Connect, Converters, Driver, Ended
from .followed_mysql import BY_CONNECTING, BY_OTHERS, BY_ROLLBACK, Followed, kind_of
from .keepalive import keep_alive
from .mysql import IN_TRANSACTION, STATE, PyMySQL
from .session_reset import SessionReset

AT_A_TIME = 4
"""Connections of a process that end statements: when a worker stops, it may have hundreds to end."""
_MORE_RESULTS = 8  # SERVER_MORE_RESULTS_EXISTS
#: By event loop.
_places: weakref.WeakKeyDictionary[Any, asyncio.Semaphore] = weakref.WeakKeyDictionary()


class FollowedAsync(Followed):
    """A connection of either driver that notices what becomes of its transaction."""

    celery_alchemy_dirty: bool = False
    """Something was executed since the last COMMIT or ROLLBACK; an error does not say whether a transaction is open."""

    async def query(self, sql: Any, *args: Any, **kwargs: Any) -> Any:
        """Execute `sql`, of whichever cursor."""
        open_before = self._is_open()
        self.celery_alchemy_dirty = self.celery_alchemy_dirty or not self.get_autocommit()  # type: ignore[attr-defined]
        try:
            found = await super(Followed, self).query(sql, *args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            if open_before and self.celery_alchemy_ended is None:
                await self._look_whether_undone(error, kind_of(sql))
            raise
        kind = kind_of(sql)
        if kind is not None:
            self._note(kind, open_before)
        return found

    async def ping(self, *args: Any, **kwargs: Any) -> Any:
        """Look whether the server is there; the driver may connect anew."""
        number, autocommit, open_before = self.thread_id(), self.get_autocommit(), self._is_open()  # type: ignore[attr-defined]
        found = await super(Followed, self).ping(*args, **kwargs)  # type: ignore[misc]
        if self.thread_id() != number:  # type: ignore[attr-defined]
            self._may_be_over(open_before, BY_CONNECTING, known=True)
            self.celery_alchemy_left: str | None = None
            if open_before and not autocommit and self.get_autocommit():  # type: ignore[attr-defined]
                await self.autocommit(False)  # type: ignore[attr-defined]
        return found

    async def commit(self) -> None:  # type: ignore[override]
        """Commit, for SQLAlchemy or for code that has this connection."""
        self.celery_alchemy_commits: int = self.celery_alchemy_commits + 1
        await super(Followed, self).commit()  # type: ignore[misc]
        self.celery_alchemy_dirty = False

    async def rollback(self) -> None:  # type: ignore[override]
        """Roll back, for SQLAlchemy or for code that has this connection."""
        open_before = self._is_open()
        await super(Followed, self).rollback()  # type: ignore[misc]
        self.celery_alchemy_dirty = False
        if open_before:
            self.celery_alchemy_ended: Ended | None = BY_ROLLBACK

    async def next_result(self, *args: Any, **kwargs: Any) -> Any:
        """Read the next result of a procedure: what it has executed since may have ended the transaction."""
        open_before = self._is_open()
        found = await super(Followed, self).next_result(*args, **kwargs)  # type: ignore[misc]
        self._may_be_over(open_before, BY_OTHERS)
        return found

    async def _look_whether_undone(self, error: Exception, kind: str | None) -> None:
        told = self.tells_undone(error, kind)
        if told is None:
            try:
                await super(Followed, self).ping(reconnect=False)  # type: ignore[misc]
                told = not self._is_open()
            except Exception as failure:
                if is_interrupt(failure):
                    raise
                told = False  # it is lost, and says so itself
        if told:
            self.note_undone(error)


class AdaptedMySQL(Adapted):
    """An adapted connection of which as much is known as of one of PyMySQL's."""

    celery_alchemy_ended: Any = forwarded("celery_alchemy_ended")
    celery_alchemy_changed: Any = forwarded("celery_alchemy_changed")
    celery_alchemy_left: Any = forwarded("celery_alchemy_left")
    celery_alchemy_commits: Any = forwarded("celery_alchemy_commits")
    celery_alchemy_unsure: Any = forwarded("celery_alchemy_unsure")
    server_status: Any = forwarded("server_status")
    server_version: Any = forwarded("server_version")
    thread_id: Any = forwarded("thread_id")


class _AsyncMySQL(Awaited, PyMySQL):
    """What both drivers have in common."""

    adapted: type[Adapted] = AdaptedMySQL
    state_names: tuple[str, ...] = (
        *("server_status (1: in a transaction, 2: autocommit)", "cursorclass", "encoders", "decoders"),
        "a transaction may be open",
    )

    def made(self, dbapi_connection: Any) -> Any:
        raw = dbapi_connection.driver_connection
        if not isinstance(raw, FollowedAsync):  # where the user's `async_creator` has made it
            raw.__class__ = followed(type(raw))  # type: ignore[arg-type]
        return super().made(dbapi_connection)

    def follow(self, dbapi_connection: Any) -> None:
        """It is followed since it was made."""

    def began(self, connection: PoolProxiedConnection) -> None:
        if connection.dbapi_connection is not None:
            super().began(connection)

    def engine_arguments(self, options: DatabaseOptions) -> dict[str, Any]:
        given = options.engine_options
        leave = "pool_reset_on_return" in given or {"poolclass", "pool"} & given.keys()
        return {} if leave else {"pool_reset_on_return": None}  # `settle` does it

    def listen(self, engine: Engine, options: DatabaseOptions) -> None:
        keep_alive(engine)

    def block_has_ended(self, dbapi_connection: Any) -> None:
        raw = dbapi_connection.driver_connection
        raw.celery_alchemy_dirty = False
        # asyncmy takes it from rows and from its own COMMIT, not from the end of a statement without rows.
        raw.server_status &= ~(IN_TRANSACTION | _MORE_RESULTS)

    def session_reset(self) -> SessionReset | None:  # type: ignore[override]
        return None

    def keep_set_up(self, dbapi_connection: Any) -> None:
        if dbapi_connection.server_status & IN_TRANSACTION:
            dbapi_connection.commit()
        dbapi_connection.driver_connection.celery_alchemy_dirty = False

    def cancel(self, dbapi_connection: Any, connect: Connect) -> None:
        loop = asyncio.get_running_loop()
        places = _places.setdefault(loop, asyncio.Semaphore(AT_A_TIME))
        await_only(places.acquire())
        try:
            other = connect()
            try:
                cursor = other.cursor()
                cursor.execute(f"KILL {dbapi_connection.thread_id()}")
                cursor.close()
            finally:
                other.close()
        finally:
            places.release()


class Asyncmy(_AsyncMySQL):
    """asyncmy."""

    @staticmethod
    def state_of(adapted: Any) -> Any:
        raw = adapted.driver_connection
        return (
            *(raw.server_status & STATE, raw._cursor_cls, Converters(raw._encoders.values())),
            *(Converters(raw._decoders.values()), raw.celery_alchemy_dirty),
        )

    def connect_args(self, url: URL, options: DatabaseOptions) -> dict[str, Any]:
        import asyncmy

        async def connect(**kwargs: Any) -> Any:
            made = followed(asyncmy.connection.Connection)(**kwargs)
            await made.connect()
            return made

        return {"async_creator_fn": connect}

    def is_lost(self, dbapi_connection: Any) -> bool:
        return bool(dbapi_connection.driver_connection._stream_broken)


class Aiomysql(_AsyncMySQL):
    """aiomysql."""

    @staticmethod
    def state_of(adapted: Any) -> Any:
        raw = adapted.driver_connection
        return (
            *(raw.server_status & STATE, raw.cursorclass, Converters(raw.encoders.values())),
            *(Converters(raw.decoders.values()), raw.celery_alchemy_dirty),
        )

    def connect_args(self, url: URL, options: DatabaseOptions) -> dict[str, Any]:
        import aiomysql

        async def connect(**kwargs: Any) -> Any:
            made = followed(aiomysql.Connection)(**kwargs)
            try:
                await made._connect()
            except BaseException:
                made.close()
                raise
            return made

        return {"async_creator_fn": connect}

    def is_lost(self, dbapi_connection: Any) -> bool:
        raw = dbapi_connection.driver_connection
        reader, writer = raw._reader, raw._writer
        return writer is None or writer.transport.is_closing() or reader.at_eof() or reader.exception() is not None


@cache
def followed(kind: Any) -> Any:
    """Return a class of connections like `kind` that notice what becomes of their transactions."""
    return type(kind.__name__, (FollowedAsync, kind), {"__module__": kind.__module__})


DRIVERS: dict[str, Driver] = {"asyncmy": Asyncmy(), "aiomysql": Aiomysql()}
