"""A connection pool in which a unit of work never waits for itself."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from sqlalchemy import exc as sa_exc
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection, QueuePool
from sqlalchemy.util import queue as sa_queue

from ..errors import NoConnectionFree, ReservedSlotsInUse
from ..interrupts import shield
from ..scope import describe_current_scope
from ..watching.activity import activities
from ..worker_pool import NO_WORKER, WorkerPool
from .held import checkouts, forget, is_noted, note
from .liveness import is_dead, note_idle
from .sizing import PoolSize

logger = logging.getLogger(__name__)


def _always() -> bool:
    return True


def _never() -> bool:
    return False


def _unnamed() -> str:
    return describe_current_scope()


class ReservedQueuePool(QueuePool):
    """QueuePool with slots kept for a thread or greenlet that already holds a connection of it.

    With a plain QueuePool, N tasks that each hold one of N connections and open a second wait for one another until
    `pool_timeout`. Here a nested checkout takes an idle connection, or opens one of `reserve` extra ones, or raises
    `ReservedSlotsInUse` at once. A thread that runs no task may be the helper of one that waits for it, so it may open
    an extra connection too, and queues when there is none. An extra connection is closed as soon as it comes back.

    At most `pool_size + max_overflow + reserve` connections are open.
    """

    reserve: int = 0
    """Connections that only a nested checkout may open."""
    who: Callable[[], str] = staticmethod(_unnamed)
    """Names the holder for the message; set by the unit-of-work layer."""
    queues: Callable[[], bool] = staticmethod(_always)
    """Tells whether this thread or greenlet runs a task, which queues for its first connection; set like `who`."""
    database: str = "default"
    """The name of the database, for metrics."""
    scarce: bool = False
    """Tasks queue for a first connection, and use other scarce pools beside it (the databases of one app). Who holds a
    connection of another one takes an extra one here rather than queue: they could wait for one another."""
    returned: Callable[[], object] = staticmethod(_never)
    """Told that a connection has come back; set like `who`."""
    is_own: Callable[[], bool] = staticmethod(_never)
    """Tells whether it is a unit of work that connects now, which gives back what it takes; set like `who`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._family: object = object()
        """The same for every connection pool that one Engine has had: what a thread holds of an old one counts."""

    def join(self, other: ReservedQueuePool) -> None:
        """Be of the family of `other`: who holds a connection of one does not queue for one of the other, for they
        could wait for each other; it may open as many extra ones as there."""
        self._family, self.reserve = other._family, other.reserve

    def connect(self) -> PoolProxiedConnection:
        if activities.observer is not None:
            began = monotonic()
            try:
                with shield:
                    return super().connect()
            finally:
                activities.waited(self.database, monotonic() - began)
        if not shield.installed:
            return super().connect()
        # An exception of a signal handler inside the checkout would lose the slot for good.
        with shield:
            return super().connect()

    def held(self) -> list[ConnectionPoolEntry]:
        """Return what the current thread or greenlet has checked out of this pool, oldest first."""
        return [record for record in checkouts.get() or () if record.__dict__.get("family") is self._family]

    def _do_get(self) -> ConnectionPoolEntry:
        if checkouts.get() and self._must_not_wait():
            record = self._get_nested()
        elif self.reserve and not self.queues():
            record = self._get_without_waiting() or self._wait_for_one()
        else:
            record = self._wait_for_one()
        if not is_noted(record):  # QueuePool calls itself again when it lost a race
            record.__dict__["family"] = self._family
            if self.scarce:
                record.__dict__["scarce"] = True
            note(record, with_place=not self.is_own())
            try:
                self._replace_if_dead(record)
            except BaseException:  # killed while asking: SQLAlchemy does not know of this record yet
                record.invalidate()
                self._do_return_conn(record)
                raise
        return record

    def _must_not_wait(self) -> bool:
        return bool(self.held()) or (self.scarce and any("scarce" in one.__dict__ for one in checkouts.get() or ()))

    def _wait_for_one(self) -> ConnectionPoolEntry:
        try:
            return super()._do_get()
        except sa_exc.TimeoutError as error:
            error.__class__ = NoConnectionFree  # SQLAlchemy's message and code, for `autoretry_for`
            raise

    def _replace_if_dead(self, record: ConnectionPoolEntry) -> None:
        """Let SQLAlchemy connect anew where the server has closed this connection while it was idle."""
        connection = record.dbapi_connection
        if connection is not None and is_dead(connection, record.info, self._dialect):
            logger.info("An idle connection was closed by the server; it is replaced by a new one")
            record.invalidate()

    def _get_nested(self) -> ConnectionPoolEntry:
        record = self._get_without_waiting()
        if record is None:
            limit = self._max_overflow + self.reserve
            raise ReservedSlotsInUse(
                f"{self.who()}: it already holds a connection, needs another one, and all "
                f"{self.size() + limit} of this connection pool are in use. Waiting could be waiting for itself, so it "
                f"is refused at once. Commit or roll back the outer unit of work first, or give the pool more room: "
                f"alchemy_engine_options = {{'pool_size': {self.size()}, 'max_overflow': {limit + self.size()}}}."
            )
        return record

    def _get_without_waiting(self) -> ConnectionPoolEntry | None:
        """Return an idle connection, or one of the reserve; None when all are in use."""
        with contextlib.suppress(sa_queue.Empty):
            return self._pool.get(False)
        with self._overflow_lock:
            if self._max_overflow > -1 and self._overflow >= self._max_overflow + self.reserve:
                return None
            self._overflow += 1
        try:
            return self._create_connection()
        except BaseException:
            self._dec_overflow()
            raise

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        forget(record)
        self.returned()
        note_idle(record.info, self._dialect)
        if self._max_overflow > -1 and self._overflow > self._max_overflow:
            # An extra connection is out. Shrink back rather than let the queue hand a reserved slot to anybody.
            try:
                record.close()
            finally:
                self._dec_overflow()
            return
        super()._do_return_conn(record)

    def recreate(self) -> ReservedQueuePool:
        return like(self, pool_size=self.size(), max_overflow=self._max_overflow, reserve=self.reserve)


def like(pool: Pool, *, pool_size: int, max_overflow: int, reserve: int) -> ReservedQueuePool:
    """Return a new, empty ReservedQueuePool that connects and reports events as `pool` does."""
    new = ReservedQueuePool(
        pool._creator,
        pool_size=pool_size,
        max_overflow=max_overflow,
        timeout=getattr(pool, "_timeout", 30.0),
        use_lifo=getattr(getattr(pool, "_pool", None), "use_lifo", False),
        recycle=pool._recycle,
        pre_ping=pool._pre_ping,
        echo=pool.echo,
        logging_name=pool._orig_logging_name,
        reset_on_return=pool._reset_on_return,
        _dispatch=pool.dispatch,
        dialect=pool._dialect,
    )
    new.reserve = reserve
    if isinstance(pool, ReservedQueuePool):
        # What a thread still holds of the old pool counts: it is a connection of the same Engine.
        new.who, new.queues, new.is_own, new._family = pool.who, pool.queues, pool.is_own, pool._family
        new.scarce, new.database, new.returned = pool.scarce, pool.database, pool.returned
    return new


def unlock_after_fork(pool: Pool) -> None:
    """Replace the locks of `pool` in the child of a fork: the thread that held one is not there to let go."""
    if isinstance(pool, QueuePool):
        pool._pool = pool._queue_class(pool._pool.maxsize, use_lifo=pool._pool.use_lifo)
        pool._overflow_lock = threading.Lock()
    checkouts.forget()


class _Retired:
    """The queue of a connection pool that is not used any more: what comes back finds it full, and is closed."""

    queue: tuple[()] = ()
    use_lifo = False

    def __init__(self, maxsize: int) -> None:
        self.maxsize = maxsize

    def put(self, record: ConnectionPoolEntry, block: bool = True) -> None:
        raise sa_queue.Full

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:
        raise sa_queue.Empty

    def qsize(self) -> int:
        return 0


def retire(pool: Pool) -> None:
    """Close the idle connections of `pool`, which is not used any more; what is checked out closes on its return.

    Not by `pool.dispose()`: its locks may be from before eventlet's monkey patch, and refuse to be taken.
    """
    if not isinstance(pool, QueuePool):
        return
    idle = getattr(pool._pool, "queue", None)
    pool._pool = _Retired(pool._pool.maxsize)  # type: ignore[assignment]
    while idle:
        idle.popleft().close()


def recycle(pool: Pool, now: float) -> None:
    """Let no connection that `pool` has made before `now` (of `time.time`) be used again: what is idle is closed now,
    the rest when it is checked out next."""
    pool._invalidate_time = now
    if isinstance(pool, QueuePool):
        idle = []
        with contextlib.suppress(sa_queue.Empty):
            while True:
                idle.append(pool._pool.get(False))
        for record in idle:
            if record.dbapi_connection is not None:
                record.close()
            try:
                pool._pool.put(record, False)
            except sa_queue.Full:  # while this one was closed, another greenlet has made one in its place
                pool._dec_overflow()


def size_of(pool: QueuePool) -> PoolSize:
    """Return the size of `pool` as it is."""
    return PoolSize(pool.size(), pool._max_overflow, getattr(pool, "reserve", 0))


def refuses(pool: Pool, worker_pool: WorkerPool) -> str | None:
    """Return why `pool` cannot serve `worker_pool`; None when it can."""
    if type(pool).__name__ == "StaticPool" and worker_pool.name != NO_WORKER and worker_pool.tasks_per_process > 1:
        return (
            f"The connection pool StaticPool has one connection, which all tasks of the worker pool {worker_pool.name} "
            f"would share, transaction included. Leave poolclass out of alchemy_engine_options, or run the worker with "
            f"--pool=solo."
        )
    return None


def max_connections(pool: Pool) -> int | None:
    """Return the most connections `pool` can have open at one time; None when it sets no limit."""
    if isinstance(pool, QueuePool):
        return size_of(pool).total
    if type(pool).__name__ in {"StaticPool", "AssertionPool"}:
        return 1
    return None
