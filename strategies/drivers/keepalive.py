"""Notice within a minute that the other end of a connection has vanished without a word.

A server that ends says so; a pulled cable, a firewall that forgets, a virtual address that moves do not. Then the
kernel waits: two hours before it asks an idle peer, a quarter of an hour for an answer to what was sent. Meanwhile a
task hangs in its statement, in its worker's slot. Asked sooner, the kernel finds out without a round trip of ours, and
an idle connection that died so fails no task: the connection pool sees it at checkout.

A long query is not cut: while the server works on it, its kernel answers the probes.
"""

from __future__ import annotations

import socket
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import URL, Engine

from .base import socket_of

IDLE_S = 30
"""An idle connection is asked after so long."""
INTERVAL_S = 10
COUNT = 3
"""So many unanswered questions, `INTERVAL_S` apart, are enough."""
UNACKNOWLEDGED_MS = 30_000
"""What was sent must have arrived after so long (Linux)."""

_SOCKET_OPTIONS = (
    ("TCP_KEEPIDLE", IDLE_S),
    ("TCP_KEEPINTVL", INTERVAL_S),
    ("TCP_KEEPCNT", COUNT),
    ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_MS),
)


def libpq_defaults(url: URL) -> dict[str, Any]:
    """Return libpq's parameters for it, without those that `url` names; for `connect_args`, where the user's win."""
    ours = {
        "keepalives_idle": IDLE_S,
        "keepalives_interval": INTERVAL_S,
        "keepalives_count": COUNT,
        "tcp_user_timeout": UNACKNOWLEDGED_MS,
    }
    return {name: value for name, value in ours.items() if name not in url.query}


def keep_alive(engine: Engine) -> None:
    """Set the same on every connection that `engine` makes with a driver that has no parameters for it.

    A `connect` listener of the user's, which runs later, may set something else.
    """
    event.listen(engine, "connect", _on_connect)


def _on_connect(dbapi_connection: Any, record: object) -> None:
    peer = socket_of(dbapi_connection)
    if peer is None or peer.family == getattr(socket, "AF_UNIX", None):
        return
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _SOCKET_OPTIONS:
        option = getattr(socket, name, None)  # not every platform has all of them
        if option is not None:
            peer.setsockopt(socket.IPPROTO_TCP, option, value)
