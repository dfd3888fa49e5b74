"""Let go of a connection without waiting for anything.

A greenlet may be killed from its hub (a cold shutdown of eventlet, whose signal handler runs there). Whatever the
greenlet then waits for, a ROLLBACK or the answer to a cancel request, switches to the hub, which is the one that kills
it: the kill fails, and the worker waits for all tasks instead of ending. So the connection is left to another greenlet.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
from collections.abc import Iterable
from typing import Any

from sqlalchemy.engine import Connection, Engine

from .._sqlalchemy import blank, record_of
from .._sqlalchemy_pools import creator_of
from ..drivers.base import driver_of

logger: logging.Logger = logging.getLogger(__name__)


def abandon(connection: Connection) -> None:
    """Free the slot of `connection` now; another thread or greenlet cancels its statement and closes it."""
    if connection.closed or connection.invalidated:
        return
    fairy = connection.connection
    dbapi_connection, record = fairy.dbapi_connection, record_of(fairy)
    if dbapi_connection is None:
        return
    if record is not None:
        blank(record)
    # Not a Thread: to start one waits until it runs. This one is a greenlet's, where that is patched.
    _thread.start_new_thread(_end, (dbapi_connection, connection.engine))


def throw_away(connections: Iterable[Connection]) -> None:
    """Free the slots of `connections`, and close them."""
    for connection in connections:
        with contextlib.suppress(Exception):
            connection.invalidate()
        with contextlib.suppress(Exception):
            connection.close()


def _end(dbapi_connection: Any, engine: Engine) -> None:
    try:
        driver_of(engine.dialect).cancel(dbapi_connection, creator_of(engine.pool))
    except Exception as error:
        logger.info("Could not cancel the statement of a killed greenlet on the server: %s", error)
    with contextlib.suppress(Exception):
        engine.dialect.do_terminate(dbapi_connection)
