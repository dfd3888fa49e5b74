"""Everything private of SQLAlchemy that cannot be avoided, in one place.

Tried on SQLAlchemy 2.0.43, 2.0.58 and 2.1.9. Each function says what breaks without it.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import event
from sqlalchemy.engine import Connection, Dialect, Transaction, TwoPhaseTransaction
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionOrigin, SessionTransactionState, _SessionCloseState
from sqlalchemy.pool import ConnectionPoolEntry

# -- Greenlets that await ----------------------------------------------------------------------------------------------

#: Attribute of a greenlet in which `await_` may be called: it switches to the parent with what is to be awaited.
_MAY_AWAIT = "__sqlalchemy_greenlet_provider__"


def may_await(greenlet: Any) -> bool:
    """Tell whether `greenlet` is one of `greenlet_spawn`, or of `host_for`."""
    return bool(getattr(greenlet, _MAY_AWAIT, False))


@functools.cache
def _host_class() -> Any:
    from greenlet import greenlet

    return type("Host", (greenlet,), {_MAY_AWAIT: True})


def host_for(function: Callable[[], Any], driver: Any) -> Any:
    """Return a greenlet, not begun, in which `function` may call `await_`: `driver`, the current one, is to await.

    Without it each task request would pay for the coroutine of `greenlet_spawn`: 6,000 instructions.
    """
    host = _host_class()(function, driver)
    host.gr_context = driver.gr_context
    return host


# -- Sessions ----------------------------------------------------------------------------------------------------------


def _held_by(transaction: SessionTransaction) -> frozenset[Connection]:
    # Keyed on both Engine and Connection.
    return frozenset(key for key in transaction._connections if isinstance(key, Connection))


#: Returns the connections that a transaction holds, or has held until it ended; never acquires one. Public
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
    return held_by(root_of(session))


def held_by(transaction: SessionTransaction | None) -> list[Connection]:
    """Return the connections that `transaction` holds, or has held until it ended; never acquires one."""
    return list(connections_held_by(transaction)) if transaction is not None else []


def joined_by(transaction: SessionTransaction) -> list[Connection]:
    """Return the connections whose transaction other code has begun, and that `transaction` leaves open at its end
    (`join_transaction_mode`): what was executed in it is part of theirs, unless it was rolled back."""
    return [
        connection
        for connection, theirs, commits, _ in set(transaction._connections.values())
        if not commits and theirs.is_active
    ]


def commits_itself(session: Session, connection: Connection) -> bool:
    """Tell whether `session`, which is in a transaction, sends the COMMIT of `connection`; it may have been given the
    Connection in a transaction that other code commits."""
    root = root_of(session)
    assert root is not None
    _, transaction, commits, _ = root._connections[connection]
    return commits and transaction is connection.get_transaction()


def is_two_phase(connection: Connection) -> bool:
    """Tell whether the transaction on `connection` was begun to be prepared: its COMMIT is another statement, and other
    listeners hear of it. The Session may say by now that it is not to be prepared after all."""
    return isinstance(connection.get_transaction(), TwoPhaseTransaction)


def is_autocommit(connection: Connection) -> bool:
    """Tell whether each statement on `connection` commits itself, because its options say so, those of its Engine, or
    the driver's. Asks no server."""
    if connection._is_autocommit_isolation():
        return True
    if connection.dialect.name == "sqlite":
        return False  # its driver is in autocommit where BEGIN is sent as a statement
    raw: Any = connection.connection.dbapi_connection
    try:
        return connection.dialect.detect_autocommit_setting(raw)
    except (NotImplementedError, AttributeError):
        return False


def savepoints_of(connection: Connection) -> Iterator[Transaction]:
    """Yield the savepoints that are open on `connection`, the innermost first."""
    savepoint: Any = connection.get_nested_transaction()
    while savepoint is not None:
        yield savepoint
        savepoint = savepoint._previous_nested


def is_committing(session: Session) -> bool:
    """Tell whether `session` is reporting a COMMIT or RELEASE that has just succeeded.

    A callback that is registered there would wait for a COMMIT that has been.
    """
    transaction = session._transaction
    return transaction is not None and transaction._state is COMMITTED


_PREPARE = inspect.unwrap(getattr(SessionTransaction, "_prepare_impl", len))


def is_preparing(session: Session) -> bool:
    """Tell whether the COMMIT of `session` has begun: listeners of `before_commit` are called, or it is flushed.

    To listen to that event of it then would change what SQLAlchemy goes through.
    """
    transaction = root_of(session)
    return transaction is not None and getattr(transaction, "_current_fn", None) is _PREPARE


def is_over(transaction: SessionTransaction) -> bool:
    """Tell whether `transaction` has ended, one way or the other."""
    return transaction._state in {SessionTransactionState.COMMITTED, SessionTransactionState.CLOSED}


def is_prepared(session: Session) -> bool:
    """Tell whether the transaction of `session` has been prepared, and waits for its second phase."""
    transaction = root_of(session)
    return transaction is not None and transaction._state is SessionTransactionState.PREPARED


#: Returns the state, the connections and the parent of the innermost transaction of a Session that is in one.
innermost_of = operator.attrgetter("_transaction._state", "_transaction._connections", "_transaction._parent")


def listen_to(session: Session, name: str, function: Callable[..., Any]) -> None:
    """Call `function` with the events `name` of `session` from the next one on.

    Without it, a listener that lets another listen to its own event makes SQLAlchemy fail: the list that it goes
    through grows.
    """
    known: Any = getattr(session.dispatch, name)
    if isinstance(known.listeners, deque):
        known.listeners = deque(known.listeners)
    event.listen(session, name, function)


def rollback_exception(transaction: SessionTransaction | None) -> BaseException | None:
    """Return what made `transaction` fail in a flush; the message of a failed transaction names it."""
    return getattr(transaction, "_rollback_exception", None)


#: Returns what a Session has to expunge: what is new, and what is persistent. `new` and the length of `identity_map`
#: tell whether there is anything too, at twenty times the cost.
objects_of = operator.attrgetter("_new", "identity_map._dict")


#: What closing a Session calls of it, whatever is in it.
CLOSING_METHODS = ("close", "_close_impl")

#: Returns what is left of a Session that is to be closed: its transaction, what it has to expunge, and its state.
remains_of = operator.attrgetter("_transaction", "_new", "identity_map._dict", "_close_state")
#: What that is where nothing is left. All that `Session.close` does then is to set this attribute to CLOSED.
NOTHING: tuple[Any, ...] = (None, {}, {}, _SessionCloseState.ACTIVE)
CLOSE_STATE, CLOSED = "_close_state", _SessionCloseState.CLOSED


_changed = operator.attrgetter("_new", "_deleted", "identity_map._modified")


def has_changes(session: Session) -> bool:
    """Tell whether a flush of `session` would have to look at any object."""
    return any(_changed(session))


#: Returns the state of a transaction, and the connections that it has, by Engine and by Connection.
provisions_of = operator.attrgetter("_state", "_connections")
ACTIVE, COMMITTED = SessionTransactionState.ACTIVE, SessionTransactionState.COMMITTED


#: How a root transaction begins: by itself, or with `Session.begin()`. Sessions of ours make theirs of a class that is
#: told of its end: to change the class of one that is made costs each task three percent.
ORIGINS = (SessionTransactionOrigin.AUTOBEGIN, SessionTransactionOrigin.BEGIN)
SUBTRANSACTION = SessionTransactionOrigin.SUBTRANSACTION


class SnapshotMap:
    """One of the maps in which a transaction notes what a ROLLBACK is to undo in objects; made when first asked for.

    That of a flush notes it in those of the transaction that it is part of.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, transaction: Any, owner: type | None = None) -> Any:
        if transaction is None:
            return self
        parent = transaction._parent  # None of a root transaction; savepoints make theirs at once
        made = WeakKeyDictionary() if parent is None else getattr(parent, self._name)
        setattr(transaction, self._name, made)  # by way of `__dict__`, all its attributes would be slower from then on
        return made


def _snapshot_maps() -> tuple[str, ...]:
    """Return the names of these maps; empty where SQLAlchemy does something else than to make them."""
    transaction: Any = SessionTransaction.__new__(SessionTransaction)
    transaction.session, transaction._parent, transaction.nested = None, None, False
    transaction.origin = SessionTransactionOrigin.AUTOBEGIN
    before = set(vars(transaction))
    try:
        transaction._take_snapshot()
    except Exception:
        return ()
    made = {name: value for name, value in vars(transaction).items() if name not in before}
    return tuple(made) if all(type(value) is WeakKeyDictionary and not value for value in made.values()) else ()


SNAPSHOT_MAPS = _snapshot_maps()


def locks_rows(statement: object) -> bool:
    """Tell whether `statement` is a SELECT ... FOR UPDATE: without a transaction its locks would go at once."""
    return getattr(statement, "_for_update_arg", None) is not None


def options_of(statement: object) -> Any:
    """Return the execution options that `statement` has itself; to ask for them costs five times as much."""
    return getattr(statement, "_execution_options", None)


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


# -- listeners ---------------------------------------------------------------------------------------------------------


def listeners_of(target: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the events that something listens to on `target` itself (an Engine, a Dialect, a Pool), not on its class,
    and what is called: the function that was given, or what SQLAlchemy has put around it."""
    for name in type(target.dispatch)._event_names:
        for listener in getattr(target.dispatch, name).listeners:
            yield name, listener
