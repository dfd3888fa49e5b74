"""After a fork: the child can neither use, close nor garbage-collect its way into the parent's connections.

A socket that both processes hold is one conversation with the server. Whatever the child sends on it, be it the
ROLLBACK of a collected connection or the goodbye of a closed one, the parent's transaction pays for: its COMMIT then
succeeds with no rows, or TLS fails with "decryption failed or bad record mac". `Engine.dispose(close=False)` covers
only connections that were idle. So in the child, for every connection of every guarded Engine:

1. put a dead socket over the driver's file descriptor (the child's table only, the parent's stays),
2. take the driver's object away from SQLAlchemy and never free it (mysqlclient's destructor says goodbye),
3. give the Engine a new connection pool.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.pool import ConnectionPoolEntry

from .. import scope
from .._sqlalchemy import blank, fairy_of, records_of, unlock_after_fork
from ..drivers.base import socket_descriptor
from ..interrupts import shield
from .pool import queues_of

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_records: weakref.WeakSet[ConnectionPoolEntry] = weakref.WeakSet()
_callbacks: list[weakref.WeakMethod[Callable[[], None]]] = []
#: Driver connections inherited from the parent. Freeing one may talk to the parent's server.
_graveyard: list[object] = []
_Pin = tuple[ConnectionPoolEntry, object, Any]
#: Held from just before a fork until just after it, by forking thread: two threads may fork at once.
_pinned: dict[int, list[_Pin]] = {}
_registered = False


def guard(engine: Engine, *, fresh: bool = False) -> Engine:
    """Watch every connection of `engine`, made already or to come, so that no fork can share one.

    Args:
        fresh: The Engine has made none yet.
    """
    _register()
    if engine not in _engines:
        _engines.add(engine)
        event.listen(engine, "connect", _remember)
        if not fresh:
            _records.update(record for pool in queues_of(engine.pool) or (engine.pool,) for record in records_of(pool))
    return engine


def on_fork(method: Callable[[], None]) -> None:
    """Call the bound `method` in the child of every fork, after the connections are cut; held weakly."""
    _register()
    _callbacks[:] = [known for known in _callbacks if known() not in {None, method}]
    _callbacks.append(weakref.WeakMethod(method))


def _register() -> None:
    # Not at import: a fork hook cannot be taken back. It runs under billiard, multiprocessing and a bare os.fork().
    global _registered  # noqa: PLW0603
    if not _registered and hasattr(os, "register_at_fork"):
        _registered = True
        os.register_at_fork(before=_pin, after_in_parent=_unpin, after_in_child=_after_in_child)


def _remember(dbapi_connection: object, record: ConnectionPoolEntry) -> None:
    _records.add(record)


def _pin() -> None:
    # CPython frees the states of the threads missing in the child before our hooks run, and
    # with them what their `threading.local`s hold: a pooled connection would send its ROLLBACK. Hold it till it is cut.
    _pinned[threading.get_ident()] = _look()


def _unpin() -> None:
    _pinned.pop(threading.get_ident(), None)


def _alive_records() -> list[ConnectionPoolEntry]:
    for _ in range(100):
        try:
            return list(_records)
        except RuntimeError:  # another thread has connected meanwhile
            continue
    return []


def _look() -> list[_Pin]:
    pins: list[_Pin] = []
    for record in _alive_records():
        pins.append((record, record.dbapi_connection, fairy_of(record)))
    return pins


def _after_in_child() -> None:
    # Runs also between fork and exec of a subprocess under gevent: short, lock-free, and it never raises.
    shield.reset()
    try:
        scope.forget_after_fork()
        _sever()
        for engine in list(_engines):
            for pool in queues_of(engine.pool):
                unlock_after_fork(pool)
            engine.dispose(close=False)
        for reference in _callbacks:
            callback = reference()
            if callback is not None:
                callback()
    except Exception:
        import logging

        logging.getLogger(__name__).exception("Cleaning up in the child of a fork failed, pid %s", os.getpid())


def _sever() -> None:
    everything = [pin for pins in (*_pinned.values(), _look()) for pin in pins]
    inherited = list({id(pin[1]): pin for pin in everything if pin[1] is not None}.values())
    _records.clear()
    if not inherited:
        _pinned.clear()
        return
    ours, theirs = socket.socketpair()
    theirs.close()
    try:
        for record, connection, fairy in inherited:
            _keep_for_good(connection)
            descriptor = socket_descriptor(connection)
            if descriptor is not None:
                os.dup2(ours.fileno(), descriptor, inheritable=False)
            blank(record)
            if fairy is not None:
                fairy.dbapi_connection = None
    finally:
        ours.close()
        _pinned.clear()


def _keep_for_good(connection: object) -> None:
    """Let nothing free `connection`, not even the interpreter at its exit: mysqlclient would say goodbye on the
    parent's socket, SQLite would roll the parent's transaction back in the file they share."""
    _graveyard.append(connection)
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
