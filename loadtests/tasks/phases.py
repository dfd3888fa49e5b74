"""Where the time of a task goes: waiting for a connection, and in the driver.

Measured on one Engine object, its `raw_connection` and its dialect's methods replaced: a listener of ConnectionEvents
costs each Connection 15 us, which is more than what some patterns differ by.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

from sqlalchemy import Engine
from sqlalchemy.pool import QueuePool

DRIVER_CALLS = ("do_execute", "do_executemany", "do_execute_no_params", "do_begin", "do_commit", "do_rollback")


class Measurement:
    """What is known of one attempt of a task, while it runs."""

    __slots__ = ("breach", "checkout_s", "database_s", "started")

    def __init__(self) -> None:
        self.started: float = time.monotonic()
        self.checkout_s: float = 0.0
        self.database_s: float = self.checkout_s
        self.breach: str = ""


_current: ContextVar[Measurement | None] = ContextVar("loadtest_measurement", default=None)
_instrumented: WeakSet[Engine] = WeakSet()


def begin() -> Measurement:
    """Measure what this thread or greenlet does from now on."""
    measurement = Measurement()
    _current.set(measurement)
    return measurement


def current() -> Measurement:
    """Return the measurement of the attempt that this thread or greenlet runs; an unread one outside of tasks."""
    return _current.get() or Measurement()


def instrument(engine: Engine) -> Engine:
    """Measure what tasks do with `engine`; return it."""
    if engine not in _instrumented:
        _instrumented.add(engine)
        instance: Any = engine
        instance.raw_connection = _timed_checkout(engine.raw_connection)
        for name in DRIVER_CALLS:
            setattr(engine.dialect, name, _timed_call(getattr(engine.dialect, name)))
    return engine


def checked_out() -> int | None:
    """Return how many connections this process has checked out; None if its connection pools do not count them."""
    counts = [engine.pool.checkedout() for engine in list(_instrumented) if isinstance(engine.pool, QueuePool)]
    return sum(counts) if counts else None


def _timed_checkout(checkout: Callable[[], Any]) -> Callable[[], Any]:
    def raw_connection() -> Any:
        measurement = _current.get() or Measurement()
        started, in_driver = time.monotonic(), measurement.database_s
        try:
            return checkout()
        finally:
            measurement.checkout_s += time.monotonic() - started
            measurement.database_s = in_driver  # what SQLAlchemy asks a new connection belongs to connecting

    return raw_connection


def _timed_call(call: Callable[..., Any]) -> Callable[..., Any]:
    def driver_call(*args: Any, **kwargs: Any) -> Any:
        measurement = _current.get()
        if measurement is None:
            return call(*args, **kwargs)
        started = time.monotonic()
        try:
            return call(*args, **kwargs)
        finally:
            measurement.database_s += time.monotonic() - started

    return driver_call
