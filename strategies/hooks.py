"""The seam at which features follow a unit of work."""

from __future__ import annotations

from typing import Any, Protocol

from sqlalchemy.orm import Session


class OpenUnit(Protocol):
    """What strategies and features may know of a unit of work."""

    opened: Session | None
    """Its Session if it has been used, else None."""
    outcome: str
    """How it has ended: "committed", "rolled back", or "nothing" where there was no transaction."""

    @property
    def commits(self) -> bool:
        """False: a good ending rolls back."""

    @property
    def info(self) -> dict[str, Any]:
        """What features keep with it."""

    @property
    def label(self) -> str:
        """Its name, for messages: `task name[task id]`."""

    @property
    def database(self) -> str:
        """The name of its database."""

    @property
    def session(self) -> Session:
        """Its Session, opened on first use."""

    def roll_back(self) -> None:
        """Roll back and give the connection back now; the unit of work goes on."""

    def close(self) -> None:
        """Release its Session; the next use opens a new one."""

    def drop_callbacks(self) -> int:
        """Forget what waits for the COMMIT; return how many callables there were."""


class UnitHook:
    """Follows units of work. Subclass it and override what is of interest; each method does nothing here.

    A unit of work has a tuple of hooks, chosen when the worker starts. It is empty where no feature asks for one.
    """

    __slots__ = ()

    def begun(self, unit: OpenUnit) -> None:
        """`unit` begins in this thread or greenlet; no Session yet."""

    def opened(self, unit: OpenUnit, session: Session) -> None:
        """`unit` has opened `session`, which has not been used yet."""

    def before_commit(self, unit: OpenUnit) -> None:
        """`unit` is about to end well. What is raised here fails it; a hook may roll its transaction back instead."""

    def before_others(self, unit: OpenUnit) -> None:
        """`unit` is about to end well together with units of work on other databases, none of which has committed or
        prepared: begin its transaction where `before_commit` would, so that it takes part."""

    def ended(self, unit: OpenUnit) -> None:
        """`unit` is over, its connection given back. `unit.outcome` tells how it ended."""
