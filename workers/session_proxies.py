"""`db.session`: a proxy that is the Session of whatever unit of work runs where it is used."""

from __future__ import annotations

from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.util import ScopedRegistry

from ..strategies.errors import NoUnitOfWork
from ..strategies.registry import UnitOfWorkRegistry
from ..strategies.scope import current_scope
from .no_unit import no_unit_here


def proxy_to(units: UnitOfWorkRegistry) -> scoped_session[Session]:
    """Return the proxy to the Session of the unit of work that is running."""
    registry = _CurrentSession(units)
    proxy: scoped_session[Session] = scoped_session(registry)  # type: ignore[arg-type]
    proxy.registry = registry
    return proxy


class _CurrentSession(ScopedRegistry[Session]):
    """The registry behind `db.session`: whatever the strategy, the innermost unit of work's Session."""

    def __init__(self, units: UnitOfWorkRegistry) -> None:
        super().__init__(lambda: units.current().session, current_scope)
        self._units = units

    def __call__(self) -> Session:
        try:
            unit = self._units.current()
        except NoUnitOfWork:
            raise no_unit_here("db.session") from None
        return unit.session

    def has(self) -> bool:
        entry = self._units.current_entry()
        return entry is not None and self._units.unit_of(entry).opened is not None

    def set(self, obj: Session) -> None:
        raise NotImplementedError("the Session of a unit of work is opened by its strategy, and is not to be replaced")

    def clear(self) -> None:
        """`db.session.remove()` ends here, with the Session closed: the unit of work opens a new one on next use."""
        entry = self._units.current_entry()
        if entry is not None:
            self._units.unit_of(entry).forget_session()
