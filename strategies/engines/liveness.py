"""Find out, without a round trip, that the server has closed an idle connection.

A server that restarts, terminates a backend or lets `wait_timeout` pass says so on the socket: there is something to
read on a connection on which nothing was asked. One `poll()` at checkout sees it, in about 1 us, where `pool_pre_ping`
pays a round trip for every task. Something to read may also be harmless (a NOTIFY, a changed server parameter), so only
then the connection is pinged. A driver that shows no socket (mysqlclient) is pinged after `PING_AFTER_S` idle seconds.
What no poll can see is a peer that vanished without a word; TCP keepalive finds it.
"""

from __future__ import annotations

import functools
import select
import sys
import time
from collections.abc import Callable
from typing import Any

from ..drivers.base import socket_descriptor

#: Key in `ConnectionPoolEntry.info` of the socket's descriptor; None for a driver that shows none.
_DESCRIPTOR = "celery_alchemy.descriptor"
#: Of the moment at which it came back, for a driver that shows no socket.
_IDLE_SINCE = "celery_alchemy.idle_since"
_UNKNOWN = object()
PING_AFTER_S = 5.0
"""Under load nobody waits so long; whoever does can afford a round trip."""
_POLLIN = 1


def is_dead(dbapi_connection: Any, info: dict[str, Any], dialect: Any) -> bool:
    """Tell whether the server has closed `dbapi_connection`, which nobody is using.

    Args:
        info: `ConnectionPoolEntry.info`, which keeps the socket's descriptor for the next time.
        dialect: The Dialect, whose `do_ping` is asked when there is something to read.
    """
    if _DESCRIPTOR not in info:
        info[_DESCRIPTOR] = socket_descriptor(dbapi_connection)
    descriptor = info[_DESCRIPTOR]
    if descriptor is None:
        idle_since = info.get(_IDLE_SINCE)
        if idle_since is None or time.monotonic() - idle_since < PING_AFTER_S:
            return False
    elif not _has_something_to_read(descriptor):
        return False
    try:
        return not dialect.do_ping(dbapi_connection)
    except Exception:
        return True


def note_idle(info: dict[str, Any], dialect: Any) -> None:
    """Remember that a connection comes back to its pool now; for drivers that show no socket, and have a server."""
    if info.get(_DESCRIPTOR, _UNKNOWN) is None and dialect.name != "sqlite":
        info[_IDLE_SINCE] = time.monotonic()


def _has_something_to_read(descriptor: int) -> bool:
    poll = _original_poll()
    if poll is None:
        return False
    poller = poll()
    poller.register(descriptor, _POLLIN)
    return bool(poller.poll(0))


@functools.cache
def _original_poll() -> Callable[[], Any] | None:
    """Return `select.poll` as it was before gevent or eventlet patched it: this look does not wait, so nobody yields.
    None on a platform without it, where nothing is known."""
    if "gevent.monkey" in sys.modules:
        from gevent.monkey import get_original

        return get_original("select", "poll")  # type: ignore[no-any-return]
    if "eventlet.patcher" in sys.modules:
        from eventlet.patcher import original

        return getattr(original("select"), "poll", None)
    return getattr(select, "poll", None)
