"""psycopg 3 on an event loop: BEGIN travels with the first statement of a transaction.

How, and what is private of psycopg there, stands in `begin_psycopg`; here is what has to be awaited.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

import psycopg
from psycopg.abc import PQGen

from .awaited_psycopg import FollowedAsyncConnection
from .begin_psycopg import IDLE, Begins, Noting, Sending, SendsBegin, beginning


class BeginningAsyncConnection(Begins, FollowedAsyncConnection):
    """A connection that can send BEGIN along with a statement; its cursors ask it to."""

    async def send_along(self, work: Callable[[], Awaitable[object]]) -> None:
        """Do `work`, which executes one statement, in a pipeline."""
        with Sending(self):
            async with self.pipeline():
                with Noting(self):
                    await work()

    async def end(self) -> None:
        """Send the COMMIT, with what is to go with it."""
        async with self.lock:
            await self.wait(self.end_along())


class _SendingBegin(SendsBegin, BeginningAsyncConnection):
    async def wait(self, gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        """Do what the driver's own does, and wait no more once it was interrupted."""
        if self.gives_up(gen):
            return None
        with Noting(self):
            return await super().wait(gen, *args, **kwargs)


class _Ending(BeginningAsyncConnection):
    async def commit(self) -> None:
        if self.take_ending():
            await self.send_along(self.end)
        else:
            await self.commit()  # the driver's: the class is another one now


BeginningAsyncConnection.ordinary, BeginningAsyncConnection.sending = BeginningAsyncConnection, _SendingBegin
BeginningAsyncConnection.ending = _Ending


class _Beginning(psycopg.AsyncCursor[Any]):
    """The first statement of a transaction takes BEGIN along."""

    async def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        connection: BeginningAsyncConnection = self.connection  # type: ignore[assignment]
        if connection.pgconn.transaction_status != IDLE or not connection.may_begin_along(query):
            return await super().execute(query, params, **options)
        await connection.send_along(partial(super().execute, query, params, **options))
        return self

    async def executemany(self, query: Any, params_seq: Iterable[Any], **options: Any) -> None:
        connection: BeginningAsyncConnection = self.connection  # type: ignore[assignment]
        if connection.pgconn.transaction_status != IDLE or not connection.may_begin_along(query):
            return await super().executemany(query, params_seq, **options)
        await connection.send_along(partial(super().executemany, query, params_seq, **options))
        return None


def connect(stock: Callable[..., Any], *args: Any, cursor_factory: Any = psycopg.AsyncCursor, **kwargs: Any) -> Any:
    """Connect as `stock`, the dialect's own, does, to a connection that begins along with the first statement."""
    kwargs["async_creator_fn"] = BeginningAsyncConnection.connect
    return stock(*args, cursor_factory=beginning(cursor_factory, _Beginning), **kwargs)
