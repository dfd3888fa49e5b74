"""What the current thread or greenlet has checked out of connection pools, and whether that is still alive; and the
connection pool that keeps it.

Our connection pools keep it themselves, the events `checkout` and `checkin` for all others. At a checkout one `poll()`
of the socket, about 1 us, finds out that the server has closed an idle connection: a server that restarts, terminates a
backend or lets `wait_timeout` pass says so on the socket. `pool_pre_ping` pays a round trip for that. Something to read
may also be harmless (a NOTIFY, a changed server parameter), so only then the connection is pinged. A driver that shows
no socket (mysqlclient) is pinged after `PING_AFTER_S` idle seconds. What no poll can see is a peer that vanished
without a word; TCP keepalive finds it.
"""

from __future__ import annotations

import functools
import logging
import select
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Dialect, Engine
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool
from sqlalchemy.util.queue import Empty, Full

from .._sqlalchemy_pools import PoolRecord, get_or_wait, give_up, return_after_all
from ..drivers.base import Driver, driver_of
from ..interrupts import is_interrupt
from ..scope import SCOPE, Scope, current_scope, here
from .holding import Holding
from .leaks import describe, find_origin

logger: logging.Logger = logging.getLogger(__name__)

#: Key in `ConnectionPoolEntry.record_info`, which stays when the record connects anew.
_KEY = "celery_alchemy.held"
PING_AFTER_S = 5.0
"""Under load no connection is idle for so long; a task that comes after such a pause can afford a round trip."""
_POLLIN = 1


class HoldingWatch:
    """Keeps, for one Engine, which connections are checked out by whom.

    Args:
        dialect: Of the Engine.
        engine_id: The same for all connection pools of the Engine, and of the one that reads beside it.
    """

    __slots__ = ("_dialect", "_state_of", "driver", "engine_id", "scarce")

    def __init__(self, dialect: Dialect, engine_id: object) -> None:
        self._dialect = dialect
        self.driver: Driver = driver_of(dialect)
        self._state_of = self.driver.state_of or _unknown
        self.engine_id: object = engine_id
        self.scarce: bool = False
        """Tasks queue for a first connection, and use other such Engines beside it (the databases of one app). Who
        holds a connection of another one takes an extra one here rather than queue: they could wait for one another."""

    def listen(self, engine: Engine, *, by_pool: bool) -> None:
        """Follow the connections of `engine`.

        Args:
            by_pool: Its connection pool is one of ours, and calls `take` and `give_back` itself.
        """
        event.listen(engine, "connect", self._on_connect)
        if not by_pool:
            event.listen(engine, "checkout", self._on_checkout)
            event.listen(engine, "checkin", self._on_checkin)
            event.listen(engine, "detach", self._on_detach)

    def take(self, record: ConnectionPoolEntry, scope: Scope) -> bool:
        """Put `record` on the stack of the running thread or greenlet, `scope`.

        Returns:
            Whether the server has closed its connection while it was idle.
        """
        info: Any = record.record_info
        holding: Holding | None = info.get(_KEY)
        if holding is None:
            holding = self._hold(record)
        # The checkin may come from another thread, or from the garbage collector: remember whose stack it is on.
        holding.stack = stack = scope.held
        stack.append(record)
        unit = scope.connecting
        if unit is None:
            holding.unit = None
            holding.origin = find_origin()  # 2 to 3 us, for a message; a unit of work gives its own back by itself
        else:
            scope.connecting = None
            unit.connected = 1
            holding.unit = weakref.ref(unit)
            holding.origin = None
        if holding.is_new and record.dbapi_connection is not None:
            self.driver.keep_set_up(record.dbapi_connection)
            holding.state, holding.is_new = self._state_of(record.dbapi_connection), False
        return (holding.poll is None or bool(holding.poll(0))) and self._is_dead(holding)

    def give_back(self, record: ConnectionPoolEntry, *, detached: bool = False) -> None:
        """Take `record` off the stack it is on; its connection is closed where the next user would meet what this one
        has set on it (unless it is `detached`, and nobody's)."""
        info: Any = record.record_info
        holding: Holding | None = info.get(_KEY)
        if holding is None or holding.stack is None:
            return
        connection = record.dbapi_connection
        if connection is not None and not detached and self._state_of(connection) != holding.state:
            self._close_changed(holding, connection)
        stack, holding.stack = holding.stack, None
        if holding.unit is not None:
            unit = holding.unit()
            holding.unit = None
            if unit is not None:
                unit.connected = 0
        if stack and stack[-1] is record:
            stack.pop()
        elif record in stack:
            stack.remove(record)
        if holding.poll is None:
            holding.idle_since = time.monotonic()

    def _close_changed(self, holding: Holding, connection: Any) -> None:
        record = holding.record
        try:
            self.driver.settle(connection)
            found = self._state_of(connection)
        except Exception as error:
            if is_interrupt(error):
                raise
            logger.warning("A connection could not be rolled back; it is closed", exc_info=True)
            record.invalidate()
            return
        if found == holding.state:
            return
        if self.driver.same_state(self._dialect, holding.state, found):
            holding.state = found
            return
        if not holding.is_new:  # else a listener may have set it up
            names = zip(self.driver.state_names, holding.state, found, strict=True)  # type: ignore[call-overload]
            changes = ", ".join(f"{name} from {one!r} to {other!r}" for name, one, other in names if one != other)
            logger.warning(
                "%s has changed a connection that others use after it: %s. The connection is closed. Set what one "
                "transaction needs with execution_options(), and what all need in db.on_engine().",
                _name_holder(holding), changes,
            )  # fmt: skip
        record.invalidate()

    def _on_connect(self, dbapi_connection: object, record: ConnectionPoolEntry) -> None:
        holding = holding_of(record) or self._hold(record)
        holding.poll = self._look_of(dbapi_connection)
        holding.number = self.driver.number_of(dbapi_connection)
        holding.idle_since = time.monotonic()
        self._begin_anew(holding, dbapi_connection)

    def _on_checkout(self, dbapi_connection: object, record: ConnectionPoolEntry, fairy: object) -> None:
        holding = holding_of(record)
        if holding is not None and self._is_dead(holding):
            raise DisconnectionError("the server has closed it while it was idle")  # SQLAlchemy connects anew
        scope = here()
        if scope.held:  # a `checkin` listener that failed has kept ours from hearing of what came back
            scope.held[:] = [one for one in scope.held if one.in_use]
        self.take(record, scope)

    def _on_checkin(self, dbapi_connection: object, record: ConnectionPoolEntry) -> None:
        self.give_back(record)

    def _on_detach(self, dbapi_connection: object, record: ConnectionPoolEntry) -> None:
        self.give_back(record, detached=True)

    def is_dead(self, record: ConnectionPoolEntry) -> bool:
        """Tell whether the server has closed the connection of `record`, which is idle."""
        holding = holding_of(record)
        return holding is not None and self._is_dead(holding)

    def _is_dead(self, holding: Holding) -> bool:
        connection = holding.record.dbapi_connection
        if connection is None:
            return False  # it is connected anew now
        if holding.poll is None:
            if self._dialect.name == "sqlite" or time.monotonic() - holding.idle_since < PING_AFTER_S:
                return False
        elif not holding.poll(0):
            return False
        try:
            alive = self._dialect.do_ping(connection)
        except Exception as error:
            if is_interrupt(error):
                raise
            alive = False
        if not alive:
            logger.info("An idle connection was closed by the server; it is replaced by a new one")
        return not alive

    def _hold(self, record: ConnectionPoolEntry) -> Holding:
        info: Any = record.record_info
        holding: Holding = info.setdefault(_KEY, Holding(self, record))
        if record.dbapi_connection is not None:  # made before anybody looked
            holding.poll = self._look_of(record.dbapi_connection)
            holding.number = self.driver.number_of(record.dbapi_connection)
            holding.idle_since = time.monotonic()
            self._begin_anew(holding, record.dbapi_connection)
        return holding

    def _begin_anew(self, holding: Holding, dbapi_connection: Any) -> None:
        self.driver.follow(dbapi_connection)
        holding.state, holding.is_new = self._state_of(dbapi_connection), True
        self.driver.leave_uncounted(dbapi_connection)  # what listeners do to it is nobody's transaction

    def _look_of(self, dbapi_connection: Any) -> Callable[[int], object] | None:
        descriptor = self.driver.descriptor(dbapi_connection)
        poll = _original_poll()
        if descriptor is None or poll is None:
            return self.driver.look_of(dbapi_connection, None)
        poller = poll()
        poller.register(descriptor, _POLLIN)
        return self.driver.look_of(dbapi_connection, poller.poll)


def _unknown(dbapi_connection: object) -> None:
    return None


def name_user(record: ConnectionPoolEntry) -> str:
    """Name who has the connection of `record`, for a message."""
    holding = holding_of(record)
    return _name_holder(holding) if holding is not None else "Code"


def _name_holder(holding: Holding) -> str:
    """Name who has a connection: a unit of work, or code that has checked it out itself inside one, or the place."""
    label = getattr(holding.unit() if holding.unit is not None else None, "label", None)
    if label is None:
        units = here().units
        place = describe(holding.origin)
        label = f"{units[-1].unit.label}, at {place}," if units else f"The code at {place}"
    return str(label)


class RecordQueue:
    """Records of a connection pool that are idle. A checkout that waits for nobody takes no lock.

    The lock of the others may be taken again by its holder: the garbage collector may put a record back at any time.

    Args:
        maxsize: The most records it keeps; 0: no limit.
        use_lifo: The record that came last goes first.
    """

    __slots__ = ("_available", "_waiting", "maxsize", "mutex", "queue", "use_lifo")

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        self.maxsize: int = maxsize
        self.use_lifo: bool = use_lifo
        self.queue: deque[ConnectionPoolEntry] = deque()
        self.mutex: threading.RLock = threading.RLock()
        self._available = threading.Condition(self.mutex)
        self._waiting = 0

    def qsize(self) -> int:
        """Return how many records there are."""
        return len(self.queue)

    def put(self, record: ConnectionPoolEntry, block: bool = True) -> None:
        """Add `record`.

        Raises:
            Full: there are `maxsize` already, whether it may `block` or not.
        """
        with self.mutex:
            if len(self.queue) >= self.maxsize > 0:
                raise Full
            self.queue.append(record)
            if self._waiting:
                self._available.notify()

    def take(self) -> ConnectionPoolEntry | None:
        """Take a record; None, at once, where there is none. One step of a deque, which needs no lock."""
        try:
            return self.queue.pop() if self.use_lifo else self.queue.popleft()
        except IndexError:
            return None

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:
        """Take a record.

        Args:
            block: Wait for one, `timeout` seconds at most; None: for ever.
        Raises:
            Empty: there is none.
        """
        with self.mutex:
            if not self.queue:
                if not block:
                    raise Empty
                self._wait(timeout)
            return self.queue.pop() if self.use_lifo else self.queue.popleft()

    def _wait(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        self._waiting += 1
        try:
            while not self.queue:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise Empty
                self._available.wait(left)
        except BaseException:
            if self.queue:
                self._available.notify()  # killed after it was called: the next in line is called instead
            raise
        finally:
            self._waiting -= 1


class ReturningRecord(PoolRecord):
    """A record that goes back to its connection pool also where a `checkin` listener fails.

    SQLAlchemy raises then before it is back, and its place is lost for good.
    """

    def checkin(self, _fairy_was_created: bool = True) -> None:
        reference = self.fairy_ref
        try:
            super().checkin(_fairy_was_created)
        except BaseException:
            return_after_all(self, reference() if reference is not None else None)
            raise


class WatchedQueuePool(QueuePool):
    """QueuePool that keeps who has checked out what."""

    _queue_class: Any = RecordQueue
    watch: HoldingWatch | None = None
    """What all connection pools of one Engine have in common; None: nobody looks."""
    record_class: Any = ReturningRecord
    nests = False
    """A thread or greenlet that holds a connection gets its next one elsewhere."""

    def _create_connection(self) -> ConnectionPoolEntry:
        return ReturningRecord(self)

    def _do_get(self) -> ConnectionPoolEntry:
        scope: Scope = getattr(current_scope(), SCOPE, None) or here()
        record = None if scope.held or self.nests else self._pool.take()  # type: ignore[attr-defined]
        if record is None:
            record = self.find(scope)
        if self.watch is not None:
            try:
                if self.watch.take(record, scope):
                    record.invalidate()
            except BaseException as error:
                give_up(record, error)
                raise
        return record

    def find(self, scope: Scope) -> ConnectionPoolEntry:
        """Return a record where none is idle, or `scope` holds one already; waits for one where it has to."""
        return get_or_wait(self)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if self.watch is not None:
            self.watch.give_back(record)
        try:
            self._pool.put(record)
        except Full:
            super()._do_return_conn(record)  # closes it, and counts it out


def holding_of(record: ConnectionPoolEntry) -> Holding | None:
    """Return what is known of the connection of `record`; None where its Engine is not watched."""
    info: Any = record.record_info
    found: Holding | None = info.get(_KEY)
    return found


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
