"""After a fork: the child can neither use, close nor garbage-collect its way into the parent's connections.

A socket that both processes hold is one conversation with the server. Whatever the child sends on it, be it the
ROLLBACK of a collected connection or the goodbye of a closed one, the parent's transaction pays for: its COMMIT then
succeeds with no rows, or TLS fails with "decryption failed or bad record mac". `Engine.dispose(close=False)` covers
only connections that were idle, of one Engine. So in the child, for every connection of every connection pool of the
process, whoever made it:

1. put a dead socket over the driver's file descriptor (the child's table only, the parent's stays),
2. take the driver's object away from SQLAlchemy and never free it (mysqlclient's destructor says goodbye),
3. let the connection pool begin anew, in place.

A listener on the class `Pool` hears of each new connection, of pools that exist already too. What was connected before
it came is found once, by a look at everything alive. A connection that code makes with the driver itself
(`psycopg.connect()`) belongs to no connection pool, and is not known here.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

from sqlalchemy import event
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection

from .. import scope
from .._sqlalchemy import blank, fairy_of, record_of
from .._sqlalchemy_pools import belong_to, find_alive, pool_of, renew_after_fork
from ..drivers.base import socket_descriptor
from ..drivers.sqlite import is_private_memory
from ..errors import CeleryAlchemyError
from ..interrupts import shield

T = TypeVar("T")

_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_records: weakref.WeakSet[ConnectionPoolEntry] = weakref.WeakSet()
#: Connections that were taken out of their connection pool (`detach`), by their id: each itself, or, where a driver's
#: connection cannot be referred to weakly, what SQLAlchemy has handed out for it.
_detached: dict[int, weakref.ref[Any]] = {}
#: Of databases in the process's own memory. The fork copies them: there is nothing to cut, and all would be lost.
_private: weakref.WeakSet[Pool] = weakref.WeakSet()
_callbacks: list[weakref.WeakMethod[Callable[[], None]]] = []
#: Driver connections inherited from the parent. Freeing one may talk to the parent's server.
_graveyard: list[object] = []
#: A record, its driver connection, and what was handed out for it. One that was detached has no record.
_Pin = tuple[ConnectionPoolEntry | None, object, Any]
#: Held from just before a fork until just after it, by forking thread: two threads may fork at once.
_pinned: dict[int, list[_Pin]] = {}
_registered = False
#: Classes of what a connection pool hands out, and what they are in the child of a fork.
_refusing: dict[type, type] = {}


def guard_everything() -> None:
    """Let no fork share a connection of this process, made already or to come, whoever makes it.

    Not at import: what is registered here cannot be taken back. The hooks of a fork run under billiard,
    multiprocessing and a bare `os.fork()`. It costs each new connection 2 us, and a checkout nothing.
    """
    global _registered  # noqa: PLW0603
    if _registered or not hasattr(os, "register_at_fork"):
        return
    _registered = True
    os.register_at_fork(before=_pin, after_in_parent=_unpin, after_in_child=_after_in_child)
    event.listen(Pool, "connect", _remember)
    event.listen(Pool, "detach", _remember_detached)
    for found in find_alive(Pool, ConnectionPoolEntry, PoolProxiedConnection):
        if issubclass(type(found), Pool):
            _pools.add(found)
        elif found.dbapi_connection is None:
            pass  # closed, or never connected
        elif issubclass(type(found), ConnectionPoolEntry):
            _remember(found.dbapi_connection, found)
        elif record_of(found) is None:
            _remember_detached(found.dbapi_connection)


def guard(pool: Pool) -> None:
    """Let `pool` begin anew in the child of a fork even where it has no connection yet: one may be on its way."""
    guard_everything()
    _pools.add(pool)


def on_fork(method: Callable[[], None]) -> None:
    """Call the bound `method` in the child of every fork, after the connections are cut; held weakly."""
    guard_everything()
    _callbacks[:] = [known for known in _callbacks if known() not in {None, method}]
    _callbacks.append(weakref.WeakMethod(method))


def _remember(dbapi_connection: object, record: ConnectionPoolEntry) -> None:
    pool = pool_of(record)
    if is_private_memory(dbapi_connection):
        if pool is not None:
            _private.add(pool)
        return
    _records.add(record)
    if pool is not None:
        _pools.add(pool)


def _remember_detached(dbapi_connection: object, record: ConnectionPoolEntry | None = None) -> None:
    key = id(dbapi_connection)
    try:
        _detached[key] = weakref.ref(dbapi_connection, lambda _: _detached.pop(key, None))
    except TypeError:  # sqlite3's, and SQLAlchemy's own for asyncio
        for holder in gc.get_referrers(dbapi_connection):
            if issubclass(type(holder), PoolProxiedConnection):
                _detached[key] = weakref.ref(holder, lambda _: _detached.pop(key, None))


def _pin() -> None:
    # CPython frees the states of the threads missing in the child before our hooks run, and
    # with them what their `threading.local`s hold: a pooled connection would send its ROLLBACK. Hold it till it is cut.
    _pinned[threading.get_ident()] = _look()


def _unpin() -> None:
    _pinned.pop(threading.get_ident(), None)


def _alive(known: Iterable[T]) -> list[T]:
    for _ in range(100):
        try:
            return list(known)
        except RuntimeError:  # another thread has connected meanwhile
            continue
    return []


def _look() -> list[_Pin]:
    pins: list[_Pin] = [(record, record.dbapi_connection, fairy_of(record)) for record in _alive(_records)]
    for reference in _alive(_detached.values()):
        found = reference()
        fairy: Any = found if issubclass(type(found), PoolProxiedConnection) else None
        pins.append((None, found if fairy is None else fairy.dbapi_connection, fairy))
    return pins


def _after_in_child() -> None:
    # Runs also between fork and exec of a subprocess under gevent: short, lock-free, and it never raises.
    shield.reset()
    pins = [pin for pins in (*_pinned.values(), _look()) for pin in pins]
    for clean in (
        scope.forget_after_fork,
        lambda: _sever(pins),
        lambda: _renew(pins),
        *(known() for known in _callbacks),
    ):
        try:
            if clean is not None:
                clean()
        except Exception:
            _log("Cleaning up in the child of a fork failed, pid %s", os.getpid())
    _pinned.clear()


def _sever(pins: list[_Pin]) -> None:
    """Cut the inherited connections, and take them away from SQLAlchemy."""
    _records.clear()
    _detached.clear()
    inherited = {id(connection): connection for _, connection, _ in pins if connection is not None}
    if not inherited:
        return
    ours, theirs = socket.socketpair()
    theirs.close()
    try:
        for connection in inherited.values():
            keep_for_good(connection)
            try:
                descriptor = socket_descriptor(connection)
                if descriptor is not None:
                    os.dup2(ours.fileno(), descriptor, inheritable=False)
            except Exception:  # a driver that cannot be asked: SQLAlchemy finds nothing to close all the same
                _log("An inherited connection cannot be cut, pid %s", os.getpid())
    finally:
        ours.close()
        for record, _, fairy in pins:
            if record is not None:
                blank(record)
            if fairy is not None:
                fairy.dbapi_connection = None
                _refuse_use(fairy)


def _refuse_use(fairy: Any) -> None:
    """Let who uses `fairy`, which the parent has checked out, read why that cannot be; SQLAlchemy has an assertion."""
    kind = type(fairy)
    if kind not in _refusing:
        refuses = dict.fromkeys(("cursor", "commit", "rollback"), _refuse)
        _refusing[kind] = type(kind.__name__, (kind,), {"__slots__": (), **refuses})
        _refusing[_refusing[kind]] = _refusing[kind]
    fairy.__class__ = _refusing[kind]


def _refuse(fairy: object, *args: object, **keywords: object) -> NoReturn:
    raise CeleryAlchemyError(
        f"This connection was checked out before the process was forked (this is pid {os.getpid()}), so it belongs to "
        f"the parent: both would talk on one socket. Check a connection out where it is used, in the task: "
        f"`with engine.connect() as connection:`, or self.db. Keep the Engine at module level, not a Connection or a "
        f"Session that is in a transaction."
    )


def _renew(pins: list[_Pin]) -> None:
    """Let all connection pools begin anew; what is checked out goes back to what they were."""
    inherited = [(record, fairy, pool_of(record)) for record, _, fairy in pins if record is not None]
    for pool in _alive(_pools):
        if pool in _private:
            continue
        try:
            was = renew_after_fork(pool)
            for record, fairy, known in inherited:
                if known is pool:
                    belong_to(was, record, fairy)
        except Exception:  # of a class that cannot be made again: its connections are cut all the same
            _log("The connection pool %r cannot begin anew in the child of a fork, pid %s", pool, os.getpid())


def keep_for_good(connection: object) -> None:
    """Let nothing free `connection`, not even the interpreter at its exit: mysqlclient would say goodbye on the
    parent's socket, SQLite would roll the parent's transaction back in the file they share."""
    _graveyard.append(connection)
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _log(message: str, *arguments: object) -> None:
    import logging

    logging.getLogger(__name__).exception(message, *arguments)
