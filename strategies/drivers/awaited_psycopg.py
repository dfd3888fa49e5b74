"""psycopg 3 on an event loop. It cancels a statement on the server itself.

Tried with psycopg 3.3.9. What is private of it is what `followed_psycopg` and `postgresql` name, and `_connect_gen`:
without it, a connection whose making was cancelled stays open as long as the exception, with its traceback, lives.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import AsyncIterator, Callable, Generator
from contextvars import ContextVar
from functools import cache
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.util import await_only

from ..options import DatabaseOptions
from ..scope import here
from .awaiting import Adapted, Awaited, forwarded
from .base import CANCEL_TIMEOUT_S, Connect, Driver
from .followed_psycopg import FollowedAdapters
from .postgresql import IDLE, Psycopg
from .session_reset import SessionReset
from .stale import is_stale
from .texts import counting


class _Making:
    """Connections that are being made, or were, by one `connect`."""

    def __init__(self) -> None:
        self._steps: list[Generator[Any, Any, Any]] = []
        self._made: list[psycopg.AsyncConnection[Any]] = []

    def follow(self, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Go the `steps`, which make a connection."""
        self._steps.append(steps)
        made = yield from steps
        self._made.append(made)
        return made

    def give_up(self) -> None:
        """Close them."""
        for steps in self._steps:
            steps.close()
        for made in self._made:
            made.pgconn.finish()


_making: ContextVar[_Making] = ContextVar("celery_alchemy_making")


class FollowedAsyncConnection(psycopg.AsyncConnection[Any]):
    """A connection of psycopg's that counts the transactions it begins."""

    celery_alchemy_begins: int = 0
    """How often a transaction has begun since SQLAlchemy has ended its last one."""

    _get_tx_start_command = counting(getattr(psycopg.AsyncConnection, "_get_tx_start_command", bytes))

    @classmethod
    async def connect(cls, *args: Any, **kwargs: Any) -> Any:
        """Do what the driver's own does; leave nothing open where that is cancelled."""
        making = _Making()
        token = _making.set(making)
        try:
            return await super().connect(*args, **kwargs)
        except BaseException:
            making.give_up()
            raise
        finally:
            _making.reset(token)

    @classmethod
    def _connect_gen(cls, *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        return _making.get().follow(super()._connect_gen(*args, **kwargs))

    @contextlib.asynccontextmanager
    async def transaction(self, *args: Any, **kwargs: Any) -> AsyncIterator[psycopg.AsyncTransaction]:
        """Do what the driver's own does. Where it has begun the transaction, it is right to end it."""
        begins = self.pgconn.transaction_status == TransactionStatus.IDLE
        try:
            async with super().transaction(*args, **kwargs) as transaction:
                yield transaction
        finally:
            if begins:
                self.celery_alchemy_begins -= 1
        if begins:
            here().ends += 1


@cache
def _followed(kind: Any) -> Any:
    if kind is psycopg.AsyncConnection:
        return FollowedAsyncConnection
    return type(kind.__name__, (FollowedAsyncConnection, kind), {"__module__": kind.__module__})


class AdaptedPsycopg(Adapted):
    """An adapted connection of which as much is known as of one of psycopg's."""

    celery_alchemy_begins: Any = forwarded("celery_alchemy_begins")
    pgconn: Any = forwarded("pgconn")
    prepare_threshold: Any = forwarded("prepare_threshold")
    # It has none where BEGIN has a round trip of its own.
    celery_alchemy_begin_with: Any = forwarded("celery_alchemy_begin_with")
    celery_alchemy_commit_with: Any = forwarded("celery_alchemy_commit_with")
    Error = psycopg.Error


class AsyncPsycopg(Awaited, Psycopg):
    """psycopg 3 on an event loop."""

    adapted: type[Adapted] = AdaptedPsycopg
    cancels_itself = True
    # The adapted connection's own class has a property of this name that shows less.
    state_of: Callable[[Any], Any] = operator.attrgetter(*(f"driver_connection.{name}" for name in Psycopg.state_names))

    def connect_args(self, url: URL, options: DatabaseOptions) -> dict[str, Any]:
        # Made as one of ours: a connection whose class is changed costs each statement more.
        return super().connect_args(url, options) | {"async_creator_fn": FollowedAsyncConnection.connect}

    def made(self, dbapi_connection: Any) -> Any:
        found = super().made(dbapi_connection)
        raw = found.driver_connection
        if not isinstance(raw, FollowedAsyncConnection):  # where the user's `async_creator` has made it
            raw.__class__ = _followed(type(raw))  # type: ignore[arg-type]
        if not isinstance(raw.adapters, FollowedAdapters):
            raw._adapters = FollowedAdapters(raw.adapters)
        return found

    def abandon(self, dbapi_connection: Any) -> None:
        dbapi_connection.driver_connection.pgconn.finish()

    def follow(self, dbapi_connection: Any) -> None:
        """It is followed since it was made."""

    def keep_set_up(self, dbapi_connection: Any) -> None:
        if dbapi_connection.pgconn.transaction_status != IDLE:
            super().keep_set_up(dbapi_connection)
        else:
            dbapi_connection.celery_alchemy_begins = 0

    def settle(self, dbapi_connection: Any) -> None:
        if dbapi_connection.pgconn.transaction_status != IDLE:
            super().settle(dbapi_connection)
        dbapi_connection.celery_alchemy_begins = 0

    def cancel(self, dbapi_connection: Any, connect: Connect) -> None:
        if self.is_executing(dbapi_connection):
            await_only(dbapi_connection.driver_connection.cancel_safe(timeout=CANCEL_TIMEOUT_S))

    def session_reset(self) -> SessionReset | None:  # type: ignore[override]
        return None

    def _execute_again(self, dialect: Dialect) -> None:
        def do_execute(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
            try:
                cursor.execute(statement, parameters)
            except Exception as error:
                if context is None or not is_stale(error, statement):
                    raise
                fairy = context.root_connection.connection
                if self.status_of(fairy.dbapi_connection) != IDLE:
                    raise
                self.stop_preparing(fairy.dbapi_connection)
                fairy.invalidate(soft=True)
                cursor.execute(statement, parameters)

        dialect.do_execute = do_execute  # type: ignore[method-assign]


DRIVERS: dict[str, Driver] = {"psycopg_async": AsyncPsycopg()}
