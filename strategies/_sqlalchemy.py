"""Everything private of SQLAlchemy that cannot be avoided, in one place.

Tried on SQLAlchemy 2.0.43, 2.0.58 and 2.1.9. Each function says what breaks without it.
"""

from __future__ import annotations

import contextlib
import gc
import operator
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import exc as sa_exc
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState
from sqlalchemy.pool import ConnectionPoolEntry, Pool, QueuePool
from sqlalchemy.util.queue import Empty, Full

Queue = TypeVar("Queue", bound=QueuePool)

# -- Sessions ----------------------------------------------------------------------------------------------------------


def _held_by(transaction: SessionTransaction) -> frozenset[Connection]:
    # Keyed on both Engine and Connection.
    return frozenset(key for key in transaction._connections if isinstance(key, Connection))


#: Returns the connections that a transaction holds, and never acquires one, as `Session.connection()` does. Public
#: since SQLAlchemy 2.1.7.
connections_held_by: Callable[[SessionTransaction], frozenset[Connection]] = (
    operator.attrgetter("connections") if hasattr(SessionTransaction, "connections") else _held_by
)


#: Return the root transaction, and the innermost savepoint. Not by the Session's own methods: ours tell who asks there
#: that a transaction is handed out, and its end must be followed.
root_of = Session.get_transaction
savepoint_of = Session.get_nested_transaction


def connections_of(session: Session) -> list[Connection]:
    """Return the connections that the transaction of `session` holds; never acquires one."""
    transaction = root_of(session)
    return list(connections_held_by(transaction)) if transaction is not None else []


def is_committing(session: Session) -> bool:
    """Tell whether `session` is reporting a COMMIT or RELEASE that has just succeeded.

    A callback that is registered there would wait for a COMMIT that has been.
    """
    transaction = session._transaction
    return transaction is not None and transaction._state is SessionTransactionState.COMMITTED


def is_prepared(session: Session) -> bool:
    """Tell whether the transaction of `session` has been prepared, and waits for its second phase."""
    transaction = root_of(session)
    return transaction is not None and transaction._state is SessionTransactionState.PREPARED


#: Returns the state, the connections and the parent of the innermost transaction of a Session that is in one.
innermost_of = operator.attrgetter("_transaction._state", "_transaction._connections", "_transaction._parent")


def hands_out_transactions(session: Session) -> bool:
    """Tell whether something listens to `session` that is given its transactions, and so can end them."""
    dispatch: Any = session.dispatch
    return bool(dispatch.after_begin or dispatch.after_transaction_create)


def rollback_exception(transaction: SessionTransaction | None) -> BaseException | None:
    """Return what made `transaction` fail in a flush; the message of a failed transaction names it."""
    return getattr(transaction, "_rollback_exception", None)


#: Returns what a Session has to expunge: what is new, and what is persistent. `new` and the length of `identity_map`
#: tell whether there is anything too, at twenty times the cost.
objects_of = operator.attrgetter("_new", "identity_map._dict")


def has_changes(session: Session) -> bool:
    """Tell whether a flush of `session` would have to look at any object."""
    return not session._is_clean()


#: Returns the state of a transaction, and the connections that it has, by Engine and by Connection.
provisions_of = operator.attrgetter("_state", "_connections")
ACTIVE = SessionTransactionState.ACTIVE


def locks_rows(statement: object) -> bool:
    """Tell whether `statement` is a SELECT ... FOR UPDATE: without a transaction its locks would go at once."""
    return getattr(statement, "_for_update_arg", None) is not None


def streams(options: Any) -> bool:
    """Tell whether execution options ask for a server-side cursor; a Query's do it in a way of their own."""
    return bool(options) and (
        bool(options.get("yield_per") or options.get("stream_results"))
        or bool(getattr(options.get("_sa_orm_load_options"), "_yield_per", None))
    )


# -- connections and their records -------------------------------------------------------------------------------------


def record_of(connection: object) -> ConnectionPoolEntry | None:
    """Return the record of a connection as a connection pool hands it out; None where it has none."""
    return getattr(connection, "_connection_record", None)


def fairy_of(record: ConnectionPoolEntry) -> Any:
    """Return what the connection pool has handed out for `record`; None while it is idle."""
    reference = getattr(record, "fairy_ref", None)
    return reference() if reference is not None else None


def blank(record: ConnectionPoolEntry) -> None:
    """Let SQLAlchemy find nothing to close in `record`, and connect anew at its next checkout."""
    record.dbapi_connection = None  # type: ignore[misc]


def wrap_ends(dialect: Dialect, ended: Callable[[Any], None]) -> None:
    """Call `ended(connection)` after each COMMIT and ROLLBACK that `dialect` sends.

    The events `commit` and `rollback` of an Engine come before these, and cost each statement 15 us.
    """

    def wrapped(end: Callable[[Any], None]) -> Callable[[Any], None]:
        def end_and_tell(connection: Any) -> None:
            end(connection)
            ended(connection)

        return end_and_tell

    dialect.do_commit = wrapped(dialect.do_commit)  # type: ignore[method-assign, assignment]
    dialect.do_rollback = wrapped(dialect.do_rollback)  # type: ignore[method-assign, assignment]


# -- connection pools --------------------------------------------------------------------------------------------------


def records_of(pool: Pool) -> list[ConnectionPoolEntry]:
    """Return the records that `pool` has made already, checked in or out; for an Engine that is guarded late."""
    if isinstance(pool, QueuePool):
        idle = idle_records(pool)
        if pool.checkedout() <= 0:
            return idle
    # A connection pool keeps no list of what is checked out; one look at everything alive, once per Engine, finds it.
    return [
        found
        for found in gc.get_objects()
        if isinstance(found, ConnectionPoolEntry) and getattr(found, "_ConnectionRecord__pool", None) is pool
    ]


def idle_records(pool: QueuePool) -> list[ConnectionPoolEntry]:
    """Return the records in the queue of `pool`."""
    return list(getattr(pool._pool, "queue", ()))


def max_overflow(pool: QueuePool) -> int:
    """Return `max_overflow` as `pool` was made with it; -1: no limit."""
    return pool._max_overflow


def is_exhausted(pool: QueuePool) -> bool:
    """Tell whether a checkout from `pool` would have to wait, or to open a connection beyond its limit."""
    return pool._max_overflow > -1 and pool._overflow >= pool._max_overflow and not pool._pool.qsize()


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


def unlock_after_fork(pool: Pool) -> None:
    """Replace the locks of `pool` in the child of a fork: the thread that held one is not there to let go."""
    if isinstance(pool, QueuePool):
        pool._pool = pool._queue_class(pool._pool.maxsize, use_lifo=pool._pool.use_lifo)
        pool._overflow_lock = threading.Lock()


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


def wrap_creator(pool: Pool, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let `pool` connect through `wrap(what it connects with)`. The event `do_connect` lets one listener connect, and
    the user's own (tokens) is to be that one."""
    pool._creator = wrap(pool._invoke_creator)


def creator_of(pool: Pool) -> Callable[[], Any]:
    """Return what makes a connection as `pool` does, outside it: the user's `connect_args`, `creator` and `do_connect`
    listeners included."""
    return lambda: pool._invoke_creator(None)  # type: ignore[arg-type]
