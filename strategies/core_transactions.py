"""Transactions and savepoints of a Connection that are ended past the Session: whatever waits for them is told.

Code may have the Connection of a Session (`session.connection()`), or may own it (`Session(connection)`). It then ends
the transaction, or a savepoint in it, by the Connection's own methods, and no event of the Session tells of that. The
events of a Connection come before the COMMIT, so they cannot tell either.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy.engine import Connection, Transaction
from sqlalchemy.orm import Session, SessionTransaction

from ._sqlalchemy import connections_of, is_prepared, root_of, savepoints_of
from .on_commit import End
from .sessions import waiting_of

_FOLLOWERS = "celery_alchemy_followers"
"""Attribute of a Connection: what is told of the end of its transactions, by transaction and by who is told."""


Follower = Callable[[End], object]


class Told(Transaction):
    """A transaction that tells how it has ended; only one that is followed becomes one."""

    __slots__ = ()

    def commit(self) -> None:
        try:
            super().commit()
        except Exception:
            raise  # it is rolled back next, and that is told
        except BaseException:
            _tell(self, End.UNKNOWN)
            raise
        _tell(self, End.COMMITTED)

    def rollback(self) -> None:
        try:
            super().rollback()
        finally:
            _tell(self, End.ROLLED_BACK)

    def close(self) -> None:
        try:
            super().close()
        finally:
            _tell(self, End.CLOSED)


@functools.cache
def _told(kind: Any) -> type[Told]:
    return type(kind.__name__, (Told, kind), {"__slots__": ()})


def _tell(transaction: Transaction, end: End) -> None:
    followers = vars(transaction.connection).get(_FOLLOWERS, {}).pop(transaction, {})
    for follower in list(followers.values()):
        follower(end)


def follow(transaction: Transaction, who: object, follower: Callable[[], Follower]) -> Follower:
    """Let what `follower()` returns be called with the end of `transaction`; once for each `who`. Return it."""
    if not isinstance(transaction, Told):
        kind: Any = type(transaction)
        transaction.__class__ = _told(kind)
    known: dict[object, Follower] = vars(transaction.connection).setdefault(_FOLLOWERS, {}).setdefault(transaction, {})
    if who not in known:
        known[who] = follower()
    return known[who]


def open_transactions(connections: Iterable[Connection]) -> list[tuple[Transaction, list[Transaction]]]:
    """Return the transactions that `connections` are in, each with the savepoints that are open in it."""
    return [
        (root, list(savepoints_of(connection)))
        for connection in connections
        if not connection.closed and (root := connection.get_transaction()) is not None and root.is_active
    ]


def follow_connections(session: Session) -> tuple[Follower, ...]:
    """Follow the transactions of the connections of `session` for what waits for its COMMIT; return what stands for
    the savepoints that are open in them.

    Code that commits a Connection sends what waits; the rollback of a savepoint drops what was registered in it with
    what is returned here.
    """
    root = root_of(session)
    if root is None:
        return ()
    who, found = weakref.ref(session), []
    for transaction, savepoints in open_transactions(connections_of(session)):
        follow(transaction, who, functools.partial(_OfRoot, who, weakref.ref(root)))
        found += [follow(savepoint, who, functools.partial(_OfSavepoint, who)) for savepoint in savepoints]
    return tuple(found)


class _OfRoot:
    """Follows the transaction of a Connection for the Session that is in it."""

    __slots__ = ("_root", "_session")

    def __init__(self, session: weakref.ref[Session], root: weakref.ref[SessionTransaction]) -> None:
        self._session, self._root = session, root

    def __call__(self, end: End) -> None:
        session = self._session()
        if session is None or root_of(session) is not self._root() or is_prepared(session):
            return  # it is the Session that ends it
        waiting = waiting_of(session)
        if waiting is not None:
            waiting.ended_outside(end)


class _OfSavepoint:
    """Stands for a savepoint of a Connection, beside what was registered in it."""

    __slots__ = ("_session",)

    def __init__(self, session: weakref.ref[Session]) -> None:
        self._session = session

    def __call__(self, end: End) -> None:
        session = self._session()
        waiting = waiting_of(session) if session is not None else None
        if waiting is not None and end is not End.COMMITTED:
            waiting.drop_in(self)
