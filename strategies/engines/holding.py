"""What is known of one connection of a connection pool."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from sqlalchemy.pool import ConnectionPoolEntry

from .leaks import Origin


class Connecting(Protocol):
    """A unit of work, as far as its connection goes."""

    connected: int


class Holding:
    """What is known of one record of a connection pool.

    State: in the pool (`stack` is None), or checked out (`stack` is the list of the thread or greenlet that did it).
    """

    __slots__ = ("idle_since", "is_new", "number", "origin", "poll", "record", "stack", "state", "unit", "watch")

    def __init__(self, watch: Any, record: ConnectionPoolEntry) -> None:
        self.watch: Any = watch
        self.record: Any = record
        self.poll: Callable[[int], object] | None = None
        """Looks whether there is something to read, or it was closed; None for a driver that shows no socket."""
        self.number: int | None = None
        """By what the server knows it; None for a driver that needs no number to stop a statement."""
        self.stack: list[ConnectionPoolEntry] | None = None
        self.unit: weakref.ref[Connecting] | None = None
        """The unit of work whose Session has it; None where other code does. Weakly: the connection pool keeps what is
        checked out alive, and that would keep the unit of work of a thread that has died, and its connection too."""
        self.origin: Origin = None
        self.idle_since: float = 0.0
        self.state: object = None
        """Of its connection when that was made: the driver's flags that code may set."""
        self.is_new: bool = False
        """It has not been checked out since: listeners may set it up still."""
