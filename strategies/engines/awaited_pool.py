"""The connection pool of an Engine on an event loop: the same sizes, reserve and messages, waiting without a lock.

A record that comes back is handed to the coroutine that has waited longest, so none can overtake it. A coroutine that
is cancelled meanwhile hands it on. What is free is a record, whether it is connected or not: so a connection that could
not be made, or was closed, frees its place for the next in line at once. (In SQLAlchemy's own the next in line waits
on until its timeout has passed.)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any, Literal

from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import await_only, concurrency
from sqlalchemy.util.queue import Empty, Full

from .._sqlalchemy_pools import count_out, get_at_once, give_up
from ..scope import Scope
from .callers import held_around, scope_of_caller
from .closing_tasks import ClosingTask
from .held import WatchedQueuePool
from .pool import MeteredQueuePool, ReservedQueuePool
from .retired_queues import retires

Record = ConnectionPoolEntry


class AwaitedQueue:
    """Records of a connection pool that are idle, and the coroutines that wait for one.

    Args:
        maxsize: The most records it keeps; 0: no limit.
        use_lifo: The record that came last goes first.
    """

    __slots__ = ("maxsize", "queue", "use_lifo", "waiting")

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        self.maxsize: int = maxsize
        self.use_lifo: bool = use_lifo
        self.queue: deque[Record] = deque()
        self.waiting: deque[asyncio.Future[Record | None]] = deque()
        """Futures of those who wait, longest first; their result is a record, or None when their time is over. One may
        be in the queue of the reserve too."""

    def qsize(self) -> int:
        """Return how many records there are."""
        return len(self.queue)

    def put(self, record: Record, block: bool = True) -> None:
        """Hand `record` to who has waited longest; keep it where nobody waits. From any thread: the garbage collector
        puts records back.

        Raises:
            Full: there are `maxsize` already, whether it may `block` or not.
        """
        if not self.hand_over(record):
            if len(self.queue) >= self.maxsize > 0:
                raise Full
            self.queue.append(record)

    def hand_over(self, record: Record) -> bool:
        """Hand `record` to who has waited longest; return whether anybody waits."""
        while self.waiting:
            future = self.waiting.popleft()
            loop = future.get_loop()
            if future.done() or loop.is_closed():
                continue
            if _running_loop() is loop:
                future.set_result(record)
            else:
                loop.call_soon_threadsafe(self._arrive, future, record)
            return True
        return False

    def _arrive(self, future: asyncio.Future[Record | None], record: Record) -> None:
        if future.done():
            self.put_back(record)
        else:
            future.set_result(record)

    def put_back(self, record: Record) -> None:
        """Hand on what somebody was given who cannot use it any more."""
        if not self.hand_over(record):
            self.queue.append(record)  # maybe one more than `maxsize`: it is closed when it comes back next

    def take(self) -> Record | None:
        """Take a record; None, at once, where there is none."""
        try:
            return self.queue.pop() if self.use_lifo else self.queue.popleft()
        except IndexError:
            return None

    def get(self, block: bool = True, timeout: float | None = None) -> Record:
        """Take a record.

        Args:
            block: Wait for one, `timeout` seconds at most; None: for ever.
        Raises:
            Empty: there is none.
        """
        record = self.take()
        if record is None and block:
            record = wait_in((self,), timeout)
        if record is None:
            raise Empty
        return record


class RetiredAwaitedQueue(AwaitedQueue):
    """The queue of a connection pool that is disposed: what comes back is closed, unless a coroutine waits for it."""

    __slots__ = ()

    def put(self, record: Record, block: bool = True) -> None:
        """Hand `record` to who has waited longest.

        Raises:
            Full: nobody waits.
        """
        if not self.hand_over(record):
            raise Full


retires(AwaitedQueue, RetiredAwaitedQueue)


def wait_in(queues: tuple[AwaitedQueue, ...], timeout: float | None) -> Record | None:
    """Return the next record that comes back to any of `queues`, to the first of which it belongs where it is given up;
    None where none does within `timeout` seconds."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Record | None] = loop.create_future()
    timer = loop.call_later(timeout, _expire, future) if timeout is not None else None
    for queue in queues:
        queue.waiting.append(future)
    record: Record | None = None
    try:
        record = await_only(future)
    except BaseException:
        if future.done() and not future.cancelled():
            record = future.result()
            if record is not None:  # cancelled after it was handed over
                queues[0].put_back(record)
        else:
            future.cancel()
        raise
    finally:
        if timer is not None:
            timer.cancel()
        for queue in queues:
            with contextlib.suppress(ValueError):
                queue.waiting.remove(future)
    return record


def _expire(future: asyncio.Future[Record | None]) -> None:
    if not future.done():
        future.set_result(None)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class WatchedAwaitedPool(WatchedQueuePool):
    """A connection pool that keeps who has checked out what, on an event loop."""

    _is_asyncio = True
    _queue_class: Any = AwaitedQueue
    _closing: set[asyncio.Future[None]]
    """Connections that are being closed; each has its place until then."""

    @property
    def line(self) -> AwaitedQueue:
        """What is idle, and who waits."""
        queue: Any = self._pool
        found: AwaitedQueue = queue
        return found

    def _do_get(self) -> Record:
        scope = scope_of_caller()
        record: Any = None if scope.held or self.nests else self.line.take()
        if record is None:
            record = self.find(scope)
        try:
            if self.watch is not None and self.watch.is_dead(record):
                record.invalidate()
            if record.dbapi_connection is None:
                record.get_connection()
            if self.watch is not None:
                self.watch.take(record, scope)
        except BaseException as error:
            give_up(record, error)
            raise
        found: Record = record
        return found

    def _create_connection(self) -> Record:
        # Not connected yet: what could be cancelled must not do so before there is a record that closes it.
        made: Record = self.record_class(self, connect=False)
        return made

    def _do_return_conn(self, record: Record) -> None:
        if self.watch is not None:
            self.watch.give_back(record)
        try:
            self._pool.put(record)
        except Full:
            self._close_apart(record)

    def _close_apart(self, record: Any) -> None:
        """Close what is one too many, in a task of its own: whoever gives it back may be cancelled meanwhile."""
        loop = _running_loop()
        if record.dbapi_connection is None or loop is None:
            self._free_place()
            return
        closing = ClosingTask(concurrency.greenlet_spawn(record.close), loop=loop)
        self.__dict__.setdefault("_closing", set()).add(closing)
        closing.add_done_callback(self._closed)

    def _closed(self, closing: asyncio.Task[None]) -> None:
        self._closing.discard(closing)
        if not closing.cancelled():
            closing.exception()  # SQLAlchemy has logged it
        self._free_place()

    async def closed(self) -> None:
        """Wait until what is being closed is closed."""
        while self.__dict__.get("_closing"):
            await asyncio.wait(list(self._closing))

    def _free_place(self) -> None:
        self._dec_overflow()

    def _dec_overflow(self) -> Literal[True]:
        count_out(self)
        if self.line.waiting:  # their turn
            record = get_at_once(self)
            if record is not None:
                self.line.put_back(record)
        return True


class AwaitedQueuePool(WatchedAwaitedPool, ReservedQueuePool):
    """ReservedQueuePool on an event loop. A coroutine that a task has started counts as nested while the task holds a
    connection, for the task may wait for it."""

    extra_class: type[WatchedQueuePool] = WatchedAwaitedPool

    def find(self, scope: Scope) -> Record:
        """Return a record, for a task of its own or a nested unit of work."""
        held = held_around(scope)
        if held and self._must_not_wait(held):
            return self._get_nested()
        return super().find(scope)

    def _get_whichever(self) -> Record:
        record = self._get_extra() or get_at_once(self)
        if record is None:
            queues = tuple(pool.line for pool in self.queues if isinstance(pool, WatchedAwaitedPool))
            record = wait_in(queues, self.timeout())
        if record is None:
            raise self.none_free()
        return record

    async def closed(self) -> None:
        """Wait until what is being closed is closed."""
        for pool in self.queues:
            await WatchedAwaitedPool.closed(pool)  # type: ignore[arg-type]


class MeteredAwaitedPool(AwaitedQueuePool, MeteredQueuePool):
    """The same, with the time of each checkout told to an observer."""
