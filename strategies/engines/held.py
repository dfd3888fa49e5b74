"""What the current thread or greenlet has checked out of connection pools, and whether that is still alive.

The events `checkout` and `checkin` of a connection pool keep it, so that it is known for every kind of pool. At a
checkout one `poll()` of the socket, about 1 us, finds out that the server has closed an idle connection: a server that
restarts, terminates a backend or lets `wait_timeout` pass says so on the socket. `pool_pre_ping` pays a round trip for
that. Something to read may also be harmless (a NOTIFY, a changed server parameter), so only then the connection is
pinged. A driver that shows no socket (mysqlclient) is pinged after `PING_AFTER_S` idle seconds. What no poll can see is
a peer that vanished without a word; TCP keepalive finds it.
"""

from __future__ import annotations

import functools
import logging
import select
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from sqlalchemy import event
from sqlalchemy.engine import Dialect, Engine
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry

from ..drivers.base import Driver, driver_of
from ..scope import CONNECTING, HELD, ScopeStack, current_scope
from .leaks import Origin, find_origin

logger = logging.getLogger(__name__)

#: One stack for all connection pools of the process, oldest first.
held: ScopeStack[ConnectionPoolEntry] = ScopeStack(HELD)
#: Key in `ConnectionPoolEntry.info`, which is emptied when the record connects anew.
_KEY = "celery_alchemy.held"
PING_AFTER_S = 5.0
"""Under load no connection is idle for so long; a task that comes after such a pause can afford a round trip."""
_POLLIN = 1


class Connecting(Protocol):
    """A unit of work, as far as its connection goes."""

    connected: int


class Holding:
    """What is known of one connection while it lives.

    State: in the pool (`stack` is None), or checked out (`stack` is the list of the thread or greenlet that did it).
    """

    __slots__ = ("engine_id", "idle_since", "origin", "poll", "scarce", "stack", "unit")

    def __init__(self, engine_id: object, scarce: bool, poll: Callable[[int], list[Any]] | None) -> None:
        self.engine_id = engine_id
        """The same for all connection pools of an Engine, and of the one that reads beside it."""
        self.scarce = scarce
        """Tasks queue for connections of this Engine, and use other such Engines beside it."""
        self.poll = poll
        """Looks whether there is something to read; None for a driver that shows no socket."""
        self.stack: list[ConnectionPoolEntry] | None = None
        self.unit: Connecting | None = None
        """The unit of work whose Session has it; None where other code does."""
        self.origin: Origin = None
        self.idle_since = 0.0


class HoldingWatch:
    """Keeps, for one Engine, which connections are checked out by whom.

    Args:
        dialect: Of the Engine.
        engine_id: What its connections have in common.
    """

    __slots__ = ("_dialect", "_driver", "engine_id", "scarce")

    def __init__(self, dialect: Dialect, engine_id: object) -> None:
        self._dialect = dialect
        self._driver: Driver = driver_of(dialect)
        self.engine_id = engine_id
        self.scarce = False

    def listen(self, engine: Engine) -> None:
        """Follow the connections of `engine`."""
        event.listen(engine, "checkout", self.on_checkout)
        event.listen(engine, "checkin", self.on_checkin)
        event.listen(engine, "detach", self.on_checkin)

    def on_checkout(self, dbapi_connection: Any, record: ConnectionPoolEntry, fairy: object) -> None:
        """Put `record` on the stack of this thread or greenlet; have a dead connection replaced."""
        holding: Holding | None = record.info.get(_KEY)
        if holding is None:
            holding = record.info[_KEY] = self._new(dbapi_connection)
        elif holding.poll is None or holding.poll(0):
            self._replace_if_dead(dbapi_connection, holding)
        scope: Any = current_scope()
        stack = getattr(scope, HELD, None)
        if stack is None:
            stack = held.get()
        stack.append(record)
        # The checkin may come from another thread, or from the garbage collector: remember whose stack it is on.
        holding.stack = stack
        holding.unit = unit = getattr(scope, CONNECTING, None)
        if unit is None:
            holding.origin = find_origin()  # 2 to 3 us, for a message; a unit of work gives its own back by itself
        else:
            setattr(scope, CONNECTING, None)
            unit.connected = 1
            holding.origin = None

    def on_checkin(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        """Take `record` off the stack it is on."""
        holding: Holding | None = record.info.get(_KEY)
        if holding is None or holding.stack is None:
            return
        stack, holding.stack = holding.stack, None
        if holding.unit is not None:
            holding.unit.connected = 0
            holding.unit = None
        if record in stack:
            stack.remove(record)
        if holding.poll is None:
            holding.idle_since = time.monotonic()

    def _new(self, dbapi_connection: Any) -> Holding:
        descriptor = self._driver.descriptor(dbapi_connection)
        poll = _original_poll()
        if descriptor is None or poll is None:
            return Holding(self.engine_id, self.scarce, None)
        poller = poll()
        poller.register(descriptor, _POLLIN)
        return Holding(self.engine_id, self.scarce, poller.poll)

    def _replace_if_dead(self, dbapi_connection: Any, holding: Holding) -> None:
        """Let SQLAlchemy connect anew where the server has closed this connection while it was idle."""
        if holding.poll is None and (
            self._dialect.name == "sqlite" or time.monotonic() - holding.idle_since < PING_AFTER_S
        ):
            return
        try:
            alive = self._dialect.do_ping(dbapi_connection)
        except Exception:
            alive = False
        if not alive:
            logger.info("An idle connection was closed by the server; it is replaced by a new one")
            raise DisconnectionError("the server has closed it while it was idle")


def holding_of(record: ConnectionPoolEntry) -> Holding | None:
    """Return what is known of the connection of `record`; None where its Engine is not watched."""
    return record.info.get(_KEY)


@functools.cache
def _original_poll() -> Callable[[], Any] | None:
    """Return `select.poll` as it was before gevent or eventlet patched it: this look does not wait, so no greenlet has
    to run meanwhile. None on a platform without it, where nothing is known."""
    if "gevent.monkey" in sys.modules:
        from gevent.monkey import get_original

        return get_original("select", "poll")  # type: ignore[no-any-return]
    if "eventlet.patcher" in sys.modules:
        from eventlet.patcher import original

        return getattr(original("select"), "poll", None)
    return getattr(select, "poll", None)
