"""What is private of SQLAlchemy's connection pools and cannot be avoided, in one place.

Tried on SQLAlchemy 2.0.43, 2.0.58 and 2.1.9. Each function says what breaks without it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import exc as sa_exc
from sqlalchemy.pool import ConnectionPoolEntry, Pool, QueuePool
from sqlalchemy.pool.base import ResetStyle, _ConnectionRecord
from sqlalchemy.util import walk_subclasses
from sqlalchemy.util.queue import Empty, Full

Queue = TypeVar("Queue", bound=QueuePool)


def find_alive(*kinds: type) -> list[Any]:
    """Return every object of these classes that is alive in this process.

    SQLAlchemy keeps no list of connection pools: one look at everything alive finds them, 0.1 s for a million objects.
    """
    frozen = gc.get_freeze_count()
    if frozen:
        gc.unfreeze()  # what is frozen is not shown
    classes: set[type] = set()
    for kind in kinds:
        classes.update(walk_subclasses(kind))
    # Not `isinstance`: a lazy object would be asked what it is.
    found = [one for one in gc.get_objects() if type(one) in classes]
    if frozen:
        gc.freeze()
    return found


def pool_of(record: ConnectionPoolEntry) -> Pool | None:
    """Return the connection pool that `record` goes back to."""
    found: Pool | None = getattr(record, "_ConnectionRecord__pool", None)
    return found


def belong_to(pool: Pool, record: ConnectionPoolEntry, fairy: Any) -> None:
    """Let `record`, and what was handed out for it, go back to `pool`."""
    setattr(record, "_ConnectionRecord__pool", pool)  # noqa: B010 - the name is mangled
    if fairy is not None:
        fairy._pool = pool


def idle_records(pool: QueuePool) -> list[ConnectionPoolEntry]:
    """Return the records in the queue of `pool`."""
    return list(getattr(pool._pool, "queue", ()))


def queue_of(pool: QueuePool) -> object:
    """Return the queue in which `pool` keeps its records."""
    return pool._pool


def max_overflow(pool: QueuePool) -> int:
    """Return `max_overflow` as `pool` was made with it; -1: no limit."""
    return pool._max_overflow


def get_at_once(pool: QueuePool) -> ConnectionPoolEntry | None:
    """Return an idle record of `pool`, or a new one within its limits; None, at once, where there is neither.

    A checkout that waits could be waiting for itself. QueuePool has one timeout, for all.
    """
    with contextlib.suppress(Empty):
        return pool._pool.get(False)
    if not pool._inc_overflow():
        return None
    try:
        return pool._create_connection()
    except BaseException:
        pool._dec_overflow()
        raise


def get_within(pool: QueuePool, seconds: float) -> ConnectionPoolEntry | None:
    """Return a record that comes back to `pool` within `seconds`; None where none does. It makes none.

    QueuePool has one timeout, for all, and calls itself where it has passed.
    """
    with contextlib.suppress(Empty):
        return pool._pool.get(True, seconds)
    return None


def get_or_wait(pool: QueuePool) -> ConnectionPoolEntry:
    """Return a record as QueuePool does, waiting for one where all are in use.

    QueuePool's own calls itself when another thread has taken the last place meanwhile, and what a subclass does at a
    checkout would be done twice.

    Raises:
        sqlalchemy.exc.TimeoutError: none has come back in time.
    """
    while True:
        waits = pool._max_overflow > -1 and pool._overflow >= pool._max_overflow
        try:
            return pool._pool.get(waits, pool._timeout)
        except Empty:
            if waits and pool._overflow >= pool._max_overflow:
                timed_out = (
                    f"QueuePool limit of size {pool.size()} overflow {pool.overflow()} reached, connection timed out, "
                    f"timeout {pool._timeout:.2f}"
                )
                raise sa_exc.TimeoutError(timed_out, code="3o7r") from None
        if pool._inc_overflow():
            try:
                return pool._create_connection()
            except BaseException:
                pool._dec_overflow()
                raise


def count_out(pool: QueuePool) -> None:
    """Note that `pool` has one connection fewer. QueuePool's own method, which a subclass may do more in."""
    QueuePool._dec_overflow(pool)


def give_up(record: ConnectionPoolEntry, error: BaseException) -> None:
    """Close what was about to be checked out, and give its place back to the connection pool it is of."""
    record._checkin_failed(error, _fairy_was_created=False)  # type: ignore[attr-defined]


def queue_like(pool: Pool, kind: type[Queue], *, pool_size: int, max_overflow: int) -> Queue:
    """Return a new, empty `kind` that connects as `pool` does and shares its listeners, those to come included.

    `Pool.recreate()` changes neither class nor size.
    """
    new = kind(
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
        dialect=pool._dialect,
    )
    new.dispatch = pool.dispatch
    return new


_silent = logging.Logger("silent", logging.CRITICAL)


def renew_after_fork(pool: Pool) -> Pool:
    """Let `pool` begin anew in the child of a fork: empty, and with locks that no thread of the parent holds.

    In place, so that its Engine, the copies of that (`execution_options`) and whoever else has it go on with it.
    `Engine.dispose(close=False)` gives one Engine another pool, and there may be none.

    Returns:
        What `pool` was; for what is still checked out to go back to.
    """
    logger, pool.logger = pool.logger, _silent  # SQLAlchemy says "Pool recreating", in each pool process
    try:
        was = pool.recreate()
    finally:
        pool.logger = logger
    was.__dict__, pool.__dict__ = pool.__dict__, was.__dict__
    if isinstance(was, QueuePool):
        was._pool = was._queue_class(was._pool.maxsize, use_lifo=was._pool.use_lifo)
        was._overflow_lock = threading.Lock()
    return was


class _Retired:
    """The queue of a connection pool that is not used any more: what comes back finds it full, and is closed."""

    queue: tuple[()] = ()
    use_lifo = False

    def __init__(self, maxsize: int) -> None:
        self.maxsize = maxsize

    def put(self, record: ConnectionPoolEntry, block: bool = True) -> None:
        raise Full

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:
        raise Empty

    def take(self) -> None:
        return None

    def qsize(self) -> int:
        return 0


def retire(pool: QueuePool) -> None:
    """Close the idle connections of `pool`, which is not used any more; what is checked out closes on its return.

    Not by `pool.dispose()`: its locks may be from before eventlet's monkey patch, and refuse to be taken.
    """
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
        with contextlib.suppress(Empty):
            while True:
                idle.append(pool._pool.get(False))
        for record in idle:
            if record.dbapi_connection is not None:
                record.close()
            try:
                pool._pool.put(record, False)
            except Full:  # while this one was closed, another greenlet has made one in its place
                pool._dec_overflow()


def commits_on_return(pool: Pool) -> bool:
    """Tell whether `pool` commits what comes back to it with an open transaction (`pool_reset_on_return="commit"`)."""
    return pool._reset_on_return is ResetStyle.reset_commit


def wrap_creator(pool: Pool, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let `pool` connect through `wrap(what it connects with)`. The event `do_connect` lets one listener connect, and
    the user's own (tokens) is to be that one."""
    pool._creator = wrap(pool._invoke_creator)


def creator_of(pool: Pool) -> Callable[[], Any]:
    """Return what makes a connection as `pool` does, outside it: the user's `connect_args`, `creator` and `do_connect`
    listeners included."""
    return lambda: pool._invoke_creator(None)  # type: ignore[arg-type]


#: The class of the records of a connection pool.
PoolRecord = _ConnectionRecord


def return_after_all(record: Any, fairy: Any) -> None:
    """Let `record` go back to its connection pool where a `checkin` listener has failed.

    Args:
        fairy: What was handed out; it could still reset the connection of the next user.
    """
    if fairy is not None:
        if hasattr(fairy, "_finalizer"):  # since SQLAlchemy 2.1
            fairy._finalizer.detach()
        fairy.dbapi_connection = fairy._connection_record = None
    pool = pool_of(record)
    if isinstance(pool, QueuePool) and record not in idle_records(pool):
        pool._return_conn(record)
