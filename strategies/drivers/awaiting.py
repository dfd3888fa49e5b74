"""Drivers for asyncio: what they have in common.

SQLAlchemy calls them in a greenlet of its own, in which `await_only` waits for a coroutine, and puts an adapted
connection around the driver's. Ours takes the place of that one: it has room for what we keep of a connection, and
what a driver's own connection is asked for. So what is known of a synchronous driver serves its sibling too.

Tried with SQLAlchemy 2.0.43, 2.0.58 and 2.1.9. Private of its adapted connections are `_connection`, the driver's own,
and `_terminate_graceful_close`, which a server that does not answer would let wait for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.util import await_only, concurrency

from .._sqlalchemy_pools import wrap_creator
from ..interrupts import current_interruption, raise_later
from .base import CANCEL_TIMEOUT_S, Connect, Driver

logger: logging.Logger = logging.getLogger(__name__)


class Stream:
    """Comes before SQLAlchemy's own class of server-side cursors."""

    __slots__ = ()

    def close(self) -> None:
        """Close it, whoever is cancelled meanwhile. SQLAlchemy takes a time limit here, an Exception, for an error in
        closing, and goes on: so that strikes afterwards."""
        cancelled = outlast(super().close)  # type: ignore[misc]
        if isinstance(cancelled, Exception):
            raise_later(cancelled)
        elif cancelled is not None:
            raise cancelled


class Adapted:
    """Comes before SQLAlchemy's own class of adapted connections."""

    _connection: Any

    async def _terminate_graceful_close(self) -> None:
        # On a TimeoutError SQLAlchemy closes the socket without a word to the server.
        await asyncio.wait_for(super()._terminate_graceful_close(), CANCEL_TIMEOUT_S)  # type: ignore[misc]


def forwarded(name: str) -> Any:
    """Return an attribute of an adapted connection that is one of the driver's own connection."""

    def get(adapted: Adapted) -> Any:
        return getattr(adapted._connection, name)

    def put(adapted: Adapted, value: Any) -> None:
        setattr(adapted._connection, name, value)

    return property(get, put)


class Awaited(Driver):
    """What the drivers for asyncio have in common; it comes first among the bases of each."""

    cooperative: bool = False
    instead: str = "the worker pool asyncio"
    adapted: type[Adapted] = Adapted
    """What comes before SQLAlchemy's class of adapted connections."""
    stream_class: type[Stream] | None = Stream
    """What comes before SQLAlchemy's class of server-side cursors; None where their close waits for nothing."""
    cancels_itself: bool = False
    """The driver stops a statement on the server when the coroutine that waits for it is cancelled."""

    def follow_transactions(self, engine: Engine) -> None:
        def wrap(create: Callable[..., Any]) -> Callable[..., Any]:
            def creator(connection_record: Any = None) -> Any:
                task: Any = asyncio.current_task()
                cancellations, interruption = task.cancelling(), current_interruption.get()
                struck = interruption.struck if interruption is not None else 0
                made = self.made(create(connection_record))
                # Before Python 3.12 `asyncio.wait_for` loses a cancellation that comes when it is done. asyncmy and
                # aiomysql connect with it.
                if task.cancelling() > cancellations:
                    made.close()
                    raise asyncio.CancelledError
                if interruption is not None and interruption.struck > struck and interruption.task is task:
                    interruption.repeat()
                return made

            return creator

        wrap_creator(engine.pool, wrap)
        if self.stream_class is not None:
            dialect: Any = engine.dialect
            dialect.execution_ctx_cls = _streaming(dialect.execution_ctx_cls, self.stream_class)  # type: ignore[arg-type]

    def made(self, dbapi_connection: Any) -> Any:
        """Return what takes the place of an adapted connection that SQLAlchemy has just made."""
        return readapted(dbapi_connection, self.adapted)

    def cancel_within_timeout(self, dbapi_connection: Any, connect: Connect) -> None:
        if self.cancels_itself or dbapi_connection is None or not concurrency.in_greenlet():
            return
        try:
            outlast(lambda: self.cancel(dbapi_connection, connect))
        except Exception as error:
            # The interruption itself is what the user must see.
            logger.info("Could not cancel the interrupted statement on the server: %s", error or type(error).__name__)

    def settle(self, dbapi_connection: Any) -> None:
        """Roll back what was left open. Whoever is cancelled meanwhile, the connection is in a known state then."""
        cancelled = outlast(lambda: self.roll_back(dbapi_connection))
        if cancelled is not None:
            raise cancelled

    def roll_back(self, dbapi_connection: Any) -> None:
        """Roll back what was left open, whether SQLAlchemy knows of it or not."""
        dbapi_connection.rollback()

    def is_lost(self, dbapi_connection: Any) -> bool:
        """Tell whether the event loop has found the connection closed."""
        return False

    def look_of(self, dbapi_connection: Any, poll: Callable[[int], list[Any]] | None) -> Callable[[int], object] | None:
        # The loop reads from the socket too, and closes it where the server has: then the descriptor is of no use, and
        # may soon be another's.
        return None if poll is None else lambda timeout: self.is_lost(dbapi_connection) or poll(timeout)


def outlast(work: Callable[[], object], within_s: float = CANCEL_TIMEOUT_S) -> asyncio.CancelledError | None:
    """Do `work`, which awaits, to its end, even if who waits for it is cancelled.

    Args:
        within_s: Seconds it may take.
    Returns:
        The cancellation that came meanwhile; None where there was none.
    Raises:
        TimeoutError: it took longer.
    """
    done: asyncio.CancelledError | None = await_only(_outlasting(work, within_s))
    return done


async def _outlasting(work: Callable[[], object], within_s: float) -> asyncio.CancelledError | None:
    task = asyncio.ensure_future(asyncio.wait_for(concurrency.greenlet_spawn(work), within_s))
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error  # `work` is bounded, so this is only late
    task.result()
    return cancelled


def readapted(dbapi_connection: Any, kind: type[Adapted]) -> Any:
    """Return an adapted connection like `dbapi_connection` that is one of `kind` too. Not by its class: SQLAlchemy's
    have slots, and no room for more."""
    if isinstance(dbapi_connection, kind):
        return dbapi_connection
    made: Any = object.__new__(_class_of(type(dbapi_connection), kind))  # type: ignore[arg-type]
    for base in type(dbapi_connection).__mro__:
        for slot in _slots_of(base):
            if hasattr(dbapi_connection, slot):
                setattr(made, slot, getattr(dbapi_connection, slot))
    made.__dict__.update(getattr(dbapi_connection, "__dict__", {}))
    return made


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return tuple(slot for slot in ((slots,) if isinstance(slots, str) else slots) if not slot.startswith("__"))


@cache
def _class_of(base: Any, kind: Any, **namespace: Any) -> Any:
    return type(base.__name__, (kind, base), {"__module__": base.__module__, **namespace})


@cache
def _streaming(context: Any, kind: Any) -> Any:
    """Return the class of execution contexts `context` with server-side cursors that are of `kind` too."""

    def create_server_side_cursor(self: Any) -> Any:
        cursor = context.create_server_side_cursor(self)
        cursor.__class__ = _class_of(type(cursor), kind, __slots__=())  # type: ignore[arg-type]
        return cursor

    return type(context.__name__, (context,), {"create_server_side_cursor": create_server_side_cursor})
