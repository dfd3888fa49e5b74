"""What an observer is told of, where there are metrics: the ends of units of work, waits for connections, leaks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Protocol

from ..hooks import UnitHook
from ..interrupts import is_interrupt

logger: logging.Logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Told of everything that happens in this process, in the thread or greenlet where it happens; must not raise."""

    def unit_ended(self, unit: Any, duration_s: float) -> None:
        """A unit of work is over: `unit.label`, `unit.outcome`, `unit.activity.statements` (None without any)."""

    def waited(self, database: str, wait_s: float) -> None:
        """A connection was checked out after so many seconds."""

    def leaked(self, count: int) -> None:
        """So many connections had to be taken back."""


class OutboxObserver(Observer, Protocol):
    """An observer that also wants to know of the outbox; told by `celery alchemy outbox run`."""

    def outbox(self, waiting: int, set_aside: int, oldest_s: float) -> None:
        """So many messages wait, so many are set aside, and the oldest that waits is so old (0.0: none waits)."""


class ObserverHook(UnitHook):
    """Tells an observer how units of work end."""

    __slots__ = ("_observer",)

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def ended(self, unit: Any) -> None:
        with harmless():
            self._observer.unit_ended(unit, monotonic() - unit.began)
        if unit.leaked:
            with harmless():
                self._observer.leaked(unit.leaked)


@contextmanager
def harmless() -> Iterator[None]:
    """Let an observer that fails fail no task."""
    try:
        yield
    except Exception as error:
        if is_interrupt(error):
            raise
        logger.exception("alchemy_metrics: the observer failed")
