"""A web application's `scoped_session` that is the task's Session where a task runs."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.util import ScopedRegistry, ThreadLocalRegistry

from ..strategies.names import type_of
from ..strategies.registry import UnitOfWorkRegistry
from ..strategies.scope import current_scope
from .errors import ConfigurationError


class SharedRegistry(ScopedRegistry[Session]):
    """The registry of a `scoped_session` that looks for a unit of work first, and asks the one it replaces else.

    Who ends a Session is who opened it: in a unit of work `remove()` does nothing, for a web entrywork calls it
    whenever an application context ends, which may be in the middle of a task.
    """

    original: Any

    def __init__(self, units: UnitOfWorkRegistry, original: Any) -> None:
        super().__init__(original, current_scope)
        self._units, self.original = units, original

    def __call__(self) -> Session:
        session: Session = self._units.current().session if self._units.is_open() else self.original()
        return session

    def has(self) -> bool:
        return not self._units.is_open() and bool(self.original.has())

    def set(self, obj: Session) -> None:
        if self._units.is_open():
            raise ConfigurationError("The Session of a unit of work is opened by its strategy, and not to be replaced.")
        self.original.set(obj)

    def clear(self) -> None:
        if not self._units.is_open():
            self.original.clear()


def share(units: UnitOfWorkRegistry, sessions: scoped_session[Any]) -> None:
    """Let `sessions` be the Session of the unit of work wherever one is open.

    Raises:
        ConfigurationError: it is no `scoped_session`.
    """
    if not isinstance(sessions, scoped_session):
        raise ConfigurationError(
            f"share() got {type_of(sessions)}, but it needs the web application's scoped_session, such as "
            f"Flask-SQLAlchemy's db.session."
        )
    original = sessions.registry
    if isinstance(original, SharedRegistry):
        original = original.original
    sessions.registry = SharedRegistry(units, original)


def is_of_thread(sessions: scoped_session[Any]) -> bool:
    """Tell whether `sessions`, which are shared, have one Session for each thread, and no scope of a request."""
    return isinstance(sessions.registry, SharedRegistry) and isinstance(sessions.registry.original, ThreadLocalRegistry)
