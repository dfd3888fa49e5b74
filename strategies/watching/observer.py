"""What whoever measures is told of: the ends of units of work, waits for connections, leaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..unit_of_work import UnitOfWork


class Observer(Protocol):
    """Told of everything that happens in this process, in the thread or greenlet where it happens; must not raise."""

    def unit_ended(self, unit: UnitOfWork, duration_s: float) -> None:
        """A unit of work is over: `unit.label`, `unit.outcome`, `unit.activity.statements`."""

    def waited(self, database: str, wait_s: float) -> None:
        """A connection was checked out after so many seconds."""

    def leaked(self, count: int) -> None:
        """So many connections had to be taken back when a task request ended."""
