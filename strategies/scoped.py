"""The strategy `scoped`: SQLAlchemy's scoped_session over a registry that knows threads, greenlets and nesting."""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.util import ScopedRegistry

from .base import SessionStrategy
from .errors import NoUnitOfWork
from .registry import innermost
from .scope import current_scope, describe_current_scope


class ScopeRegistry(ScopedRegistry[Session]):
    """Registry for `scoped_session`, keyed on the current thread or greenlet, held weakly.

    It looks at the stack of open units of work that the thread or greenlet carries: the innermost one's Session is the
    current one, and ending it uncovers the outer. A key is never an id: those are reused, and then a new greenlet finds
    a dead one's Session.
    """

    __slots__ = ("_strategy",)

    def __init__(self, strategy: ScopedStrategy) -> None:
        super().__init__(lambda: strategy.sessions.new(bind=strategy.engine), current_scope)
        self._strategy = strategy

    def __call__(self) -> Session:
        unit = innermost(self._strategy)
        if unit is None:
            raise NoUnitOfWork(
                f"No unit of work is open in {describe_current_scope()}, so scoped_session has no Session for it. "
                f"Open one with `with db.unit_of_work() as session:`."
            )
        return unit.session

    def has(self) -> bool:
        unit = innermost(self._strategy)
        return unit is not None and unit.opened is not None

    def set(self, obj: Session) -> None:
        raise NotImplementedError("the Session of a unit of work is opened by its strategy, and is not to be replaced")

    def clear(self) -> None:
        """`scoped_session.remove()` ends here, the Session closed: the unit of work opens a new one on next use."""
        unit = innermost(self._strategy)
        if unit is not None:
            unit.forget_session()


class ScopedStrategy(SessionStrategy):
    """SQLAlchemy's `scoped_session`, its registry keyed on the thread or greenlet, on one Engine per process.

    **Made for** threads, gevent and eventlet; **correct under** every worker pool.
    **Not made for** handing a Session to another thread or greenlet: no strategy is.
    """

    name = "scoped"
    engine_lives = "the process; after a fork the child drops what it inherited"
    keyed_on = "the thread or greenlet, held weakly: a stack, one Session per open unit of work"
    released = "each is removed at its own unit's end"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scoped_session: scoped_session[Session] = scoped_session(self._new_session)  # type: ignore[arg-type]
        self.scoped_session.registry = ScopeRegistry(self)

    def make_engine(self) -> Engine:
        return self.engines.shared(self.size)

    def _new_session(self) -> Session:
        return self.sessions.new(bind=self.engine)
