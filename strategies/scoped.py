"""The strategy `scoped`: SQLAlchemy's scoped_session over a registry that knows threads, greenlets and nesting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.util import ScopedRegistry

from .base import SessionStrategy
from .errors import NoUnitOfWork
from .scope import ScopeStack, current_scope, describe_current_scope

if TYPE_CHECKING:
    from .unit_of_work import UnitOfWork


class _Slot:
    """One open unit of work's place in the registry; the Session comes with its first use."""

    __slots__ = ("home", "session", "unit")

    def __init__(self, unit: UnitOfWork) -> None:
        self.unit = unit
        self.session: Session | None = None
        self.home: list[_Slot] = []


class ScopeRegistry(ScopedRegistry[Session]):
    """Registry for `scoped_session`, keyed on the current thread or greenlet, held weakly.

    A stack, for units of work nest: the innermost one's Session is the current one, and ending it uncovers the outer.
    A key is never an id: those are reused, and then a new greenlet finds a dead one's Session.
    """

    __slots__ = ("stack",)

    def __init__(self, createfunc: Any) -> None:
        super().__init__(createfunc, current_scope)
        self.stack: ScopeStack[_Slot] = ScopeStack()

    def __call__(self) -> Session:
        slot = self.stack.top()
        if slot is None:
            raise NoUnitOfWork(
                f"No unit of work is open in {describe_current_scope()}, so scoped_session has no Session for it. "
                f"Open one with `with db.unit_of_work() as session:`."
            )
        return slot.unit.session

    def has(self) -> bool:
        slot = self.stack.top()
        return slot is not None and slot.session is not None

    def set(self, obj: Session) -> None:
        raise NotImplementedError("the Session of a unit of work is opened by its strategy, and is not to be replaced")

    def clear(self) -> None:
        """`scoped_session.remove()` ends here, the Session closed: the unit of work opens a new one on next use."""
        slot = self.stack.top()
        if slot is not None:
            slot.session = None
            slot.unit.forget_session()


class ScopedStrategy(SessionStrategy):
    """SQLAlchemy's `scoped_session`, its registry keyed on the thread or greenlet, on one Engine per process.

    **Made for** threads, gevent and eventlet; **right under** every worker pool.
    **Not made for** handing a Session to another thread or greenlet: no strategy is.
    """

    name = "scoped"
    engine_lives = "the process; after a fork the child drops what it inherited"
    keyed_on = "the thread or greenlet, held weakly: a stack, one Session per open unit of work"
    released = "each is removed at its own unit's end"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scoped_session: scoped_session[Session] = scoped_session(self.new_session)  # type: ignore[arg-type]
        self._registry = ScopeRegistry(self.new_session)
        self.scoped_session.registry = self._registry

    def make_engine(self) -> Engine:
        return self.engines.shared(self.size)

    def after_fork(self) -> None:
        super().after_fork()
        self._registry.stack.forget()

    def enter(self, unit: UnitOfWork) -> None:
        slot = unit.kept = _Slot(unit)
        slot.home = self._registry.stack.push(slot)

    def open(self, unit: UnitOfWork) -> Session:
        session: Session = self.scoped_session.session_factory()
        unit.kept.session = session
        return session

    def release(self, unit: UnitOfWork, session: Session) -> None:
        unit.kept.session = None
        super().release(unit, session)

    def leave(self, unit: UnitOfWork) -> None:
        self._registry.stack.remove(unit.kept, unit.kept.home)
        super().leave(unit)
