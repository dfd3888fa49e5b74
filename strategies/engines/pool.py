"""A connection pool in which a unit of work never waits for itself."""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import exc as sa_exc
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, Pool, PoolProxiedConnection, QueuePool

from .._sqlalchemy_pools import get_at_once, get_within, max_overflow, queue_like, recycle
from ..errors import NoConnectionFree, ReservedSlotsInUse
from ..interrupts import shield
from ..scope import Scope, describe_current_scope, living_scopes
from ..worker_pool import NO_WORKER, WorkerPool
from .held import HoldingWatch, WatchedQueuePool, holding_of
from .retired_queues import retire_queue
from .sizing import PoolSize

_UNUSED_FOR = 10
"""Ordinary checkouts without a nested one, after which the connections of nested units are closed."""
_LOOK_EVERY_S = 0.02
"""Who waits for a slot in reserve looks this often whether an ordinary connection has come free."""


class ReservedQueuePool(WatchedQueuePool):
    """QueuePool with slots kept for a thread or greenlet that already holds a connection of it.

    With a plain QueuePool, N tasks that each hold one of N connections and open a second wait for one another until
    `pool_timeout`. Here a nested checkout takes a connection of a second queue, as big as `reserve`, or raises
    `ReservedSlotsInUse` at once. The second queue is emptied when tasks have done without for a while. A thread that
    runs no task may be the helper of one that waits for it, so it takes whichever of both has a connection first. So
    does a task where all tasks that run have room among the ordinary connections: its own helpers have taken them.

    At most `pool_size + max_overflow + reserve` connections are open.
    """

    describe_holder: Callable[[], str] = staticmethod(describe_current_scope)
    """Names who holds a connection, for a message; set by the unit-of-work layer."""
    waits_in_line: Callable[[Scope, int], bool] = staticmethod(lambda scope, connections: True)
    """Tells whether a thread or greenlet is to wait with the tasks that compete for so many ordinary connections, and
    may have none in reserve; set by the unit-of-work layer."""
    reserve: int = 0
    """Connections that only a nested checkout, or a helper thread, may open."""
    extra_class: type[WatchedQueuePool] = WatchedQueuePool
    """Of the second queue."""
    _extra: WatchedQueuePool | None = None
    _unused = 0

    def find(self, scope: Scope) -> ConnectionPoolEntry:
        """Return a record, for a task of its own or a nested unit of work."""
        if scope.held and self._must_not_wait(scope.held):
            return self._get_nested()
        if self.nests:
            self._close_unused()
        if self.reserve:
            record = get_at_once(self)
            if record is not None:
                return record
            if not self.waits_in_line(scope, self.size()):
                return self._get_whichever()
        try:
            return super().find(scope)
        except sa_exc.TimeoutError as error:
            error.__class__ = NoConnectionFree  # SQLAlchemy's message and code, for `autoretry_for`
            raise

    def _must_not_wait(self, held: list[ConnectionPoolEntry]) -> bool:
        own = self.watch
        for record in held:
            holding = holding_of(record)
            if holding is not None and own is not None:
                other = holding.watch
                if other.engine_id is own.engine_id or (own.scarce and other.scarce):
                    return True
        return False

    def is_of(self, record: ConnectionPoolEntry) -> bool:
        """Tell whether `record` is of this pool, or of another one of its Engine."""
        holding = holding_of(record)
        return holding is not None and self.watch is not None and holding.watch.engine_id is self.watch.engine_id

    def _get_nested(self) -> ConnectionPoolEntry:
        record = self._get_extra() if self.reserve else None
        if record is None:
            record = get_at_once(self)
        if record is None:
            size, limit = self.size(), max_overflow(self) + self.reserve
            raise ReservedSlotsInUse(
                f"{self.describe_holder()}: it already holds a connection, needs another one, and all "
                f"{size + limit} of this connection pool are in use, by {self._describe_holders()}. Waiting could be "
                f"waiting for itself, so it is refused at once. Commit or roll back the outer unit of work first, or "
                f"give the pool more room: alchemy_engine_options = {{'pool_size': {size}, 'max_overflow': "
                f"{limit + size}}}, or create_engine() with these where you bring the Engine."
            )
        return record

    def _get_whichever(self) -> ConnectionPoolEntry:
        """Return whatever comes free first: in the ordinary queue or among the reserve."""
        deadline = time.monotonic() + self.timeout()
        while True:
            record = self._get_extra() or get_at_once(self)
            if record is not None:
                return record
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise self.none_free()
            # Waiting there is a place in a queue; the other queue is that of the tasks, and is only looked at.
            if self._extra is not None:
                record = get_within(self._extra, min(left_s, _LOOK_EVERY_S))
                if record is not None:
                    return record

    def none_free(self) -> NoConnectionFree:
        """Return the error for who has waited for both queues."""
        return NoConnectionFree(
            f"{self.describe_holder()}: no connection became free within {self.timeout():g} s (pool_timeout), "
            f"neither of the {self.size() + max(max_overflow(self), 0)} that tasks queue for, nor of the "
            f"{self.reserve} in reserve. They are in use by {self._describe_holders()}.",
            code="3o7r",
        )

    def _describe_holders(self) -> str:
        """Name whatever holds a connection of this Engine, for a message."""
        names = []
        for scope in living_scopes():
            if any(self.is_of(record) for record in list(scope.held)):
                units = list(scope.units)
                names.append(units[-1].unit.label if units else "code without a unit of work")
        return ", ".join(dict.fromkeys(names)) or "nothing any more"

    def _close_unused(self) -> None:
        """Close the connections that nested units have left, once tasks do without: each is a process of the server."""
        self._unused += 1
        extra = self._extra
        if self._unused > _UNUSED_FOR and extra is not None and not extra.checkedout():
            self.nests: bool = False
            recycle(extra, time.time())

    def _get_extra(self) -> ConnectionPoolEntry | None:
        """Return a record of the reserve; None when all of it is in use. It goes back there by itself."""
        extra = self._extra
        if extra is None:
            made = queue_like(self, self.extra_class, pool_size=self.reserve, max_overflow=0)
            made.watch = self.watch
            # Two threads may come here at once, and with two such pools twice the reserve would be opened.
            extra = self.__dict__.setdefault("_extra", made)
        self._unused, self.nests = 0, True
        return get_at_once(extra)

    def recreate(self) -> ReservedQueuePool:
        """Return a new, empty pool like this one."""
        made = super().recreate()
        assert isinstance(made, ReservedQueuePool)
        made.be_like(self)
        return made

    def be_like(self, other: ReservedQueuePool) -> None:
        """Belong to the Engine of `other`, with as much in reserve."""
        self.describe_holder, self.waits_in_line = other.describe_holder, other.waits_in_line
        self.reserve = other.reserve
        self.watch: HoldingWatch | None = other.watch

    def dispose(self) -> None:
        """Close what is idle, in both queues, and what is in use when it comes back."""
        super().dispose()
        retire_queue(self)  # else that would be open until the garbage collector comes by
        if self._extra is not None:
            self._extra.dispose()
            retire_queue(self._extra)

    def checkedout(self) -> int:
        """Return how many connections are in use, nested ones included."""
        return super().checkedout() + (self._extra.checkedout() if self._extra is not None else 0)

    def checkedin(self) -> int:
        """Return how many connections are idle."""
        return super().checkedin() + (self._extra.checkedin() if self._extra is not None else 0)

    @property
    def queues(self) -> tuple[QueuePool, ...]:
        """This pool, and its reserve where that is in use."""
        return (self,) if self._extra is None else (self, self._extra)


class DeferringQueuePool(ReservedQueuePool):
    """The same for prefork: a soft time limit inside a checkout would lose the slot for good."""

    @shield.covers
    def connect(self) -> PoolProxiedConnection:
        """Check a connection out."""
        if not shield.applies:
            return super().connect()
        shield.depth += 1
        try:
            return super().connect()
        finally:
            shield.depth -= 1
            if shield.pending is not None:
                shield.check()


class MeteredQueuePool(DeferringQueuePool):
    """The same, with the time of each checkout told to an observer."""

    waited: Callable[[float], object] = staticmethod(lambda wait_s: None)
    """Called with the seconds that a checkout took."""

    def connect(self) -> PoolProxiedConnection:
        """Check a connection out."""
        began = time.monotonic()
        try:
            return super().connect()
        finally:
            self.waited(time.monotonic() - began)

    def be_like(self, other: ReservedQueuePool) -> None:
        """Belong to the Engine of `other`, and to its observer."""
        super().be_like(other)
        self.waited = getattr(other, "waited", self.waited)


def resized(pool: Pool, kind: type[ReservedQueuePool], size: PoolSize) -> ReservedQueuePool:
    """Return a new, empty pool of `kind` and `size` that connects and reports events as `pool` does."""
    new = queue_like(pool, kind, pool_size=size.pool_size, max_overflow=size.max_overflow)
    if isinstance(pool, ReservedQueuePool):
        # What a thread still holds of the old pool counts: it is a connection of the same Engine.
        new.be_like(pool)
    new.reserve = size.reserve
    return new


def size_of(pool: QueuePool) -> PoolSize:
    """Return the size of `pool` as it is."""
    return PoolSize(pool.size(), max_overflow(pool), getattr(pool, "reserve", 0))


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


def queues_of(pool: Pool) -> tuple[QueuePool, ...]:
    """Return the queues of `pool`: its reserve is one of its own; empty for a pool that is no queue."""
    if isinstance(pool, ReservedQueuePool):
        return pool.queues
    return (pool,) if isinstance(pool, QueuePool) else ()


def may_hold_any(pool: Pool) -> bool:
    """Tell whether `pool` may have connections that are open."""
    if isinstance(pool, QueuePool):
        return any(one.checkedin() + one.checkedout() > 0 for one in queues_of(pool))
    return not isinstance(pool, NullPool)


def recycle_all(pool: Pool) -> None:
    """Let no connection that is open now serve another unit of work."""
    for one in queues_of(pool) or (pool,):
        recycle(one, time.time())
