"""Making Sessions: the options tasks need, and what the user brings."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from .errors import InvalidSetting, refused_as
from .sessions import UnitSession, class_of

#: A `sessionmaker`, a Session class, or any callable that takes Session's keyword arguments.
MakeSession = Callable[..., Session]

DEFAULTS: dict[str, Any] = {
    # An attribute read after the commit must not open a new transaction.
    "expire_on_commit": False,
    # A Session used after its task is a bug: raise instead of checking out a connection that nobody gives back.
    "close_resets_only": False,
}


class SessionFactory:
    """Where Sessions come from: SQLAlchemy's sessionmaker with our defaults, or the user's `session_factory`.

    Args:
        factory: A `sessionmaker`, a Session class, or any callable that takes Session's keyword arguments.
        options: Keyword arguments of Session (`alchemy_session_options`); they win over the defaults, and over those
            of a `sessionmaker`.
        kinds: Subclasses of UnitSession that each Session is to be, the first winning.
    """

    def __init__(
        self,
        factory: MakeSession | None,
        options: dict[str, Any],
        kinds: tuple[type[UnitSession], ...] = (UnitSession,),
    ) -> None:
        self._kinds = kinds
        self._options = options
        self._factory = factory
        self._made: dict[type[Session], MakeSession] = {}

    @property
    def bind(self) -> Engine | None:
        """The Engine that the user's sessionmaker is bound to; None when it has none."""
        if isinstance(self._factory, sessionmaker):
            bind = self._factory.kw.get("bind")
            return bind if isinstance(bind, Engine) else None
        return None

    @property
    def binds(self) -> list[Engine]:
        """The Engines in `binds`, of the options and of the user's sessionmaker."""
        kept = self._factory.kw.get("binds") if isinstance(self._factory, sessionmaker) else None
        given = self._options.get("binds") or {}
        found = [*(kept or {}).values(), *(given.values() if isinstance(given, dict) else ())]
        return [engine for engine in found if isinstance(engine, Engine)]

    @functools.cached_property
    def new(self) -> MakeSession:
        """Makes a Session: `new(bind=...)`, with further keyword arguments of Session; it connects with its first
        statement. A partial of the class, so that nothing of ours stands between."""
        return self._maker(self._kinds)

    def new_as(self, kind: type[Session]) -> MakeSession:
        """Return what makes a Session that is one of `kind` too."""
        made = self._made.get(kind)
        if made is None:
            made = self._made[kind] = self._maker((kind, *self._kinds))
        return made

    def _maker(self, kinds: tuple[type[Session], ...]) -> MakeSession:
        factory = self._factory
        if factory is None:
            base: type[Session] = Session
            options = DEFAULTS
        elif isinstance(factory, sessionmaker):
            base, options = factory.class_, {**DEFAULTS, **factory.kw}
        elif isinstance(factory, type):
            base, options = factory, DEFAULTS
        else:
            return functools.partial(_make_checked, factory, kinds, {**DEFAULTS, **self._options})
        options = {**options, **self._options}
        options.pop("bind", None)
        has_one_bind = not options.get("binds") and base.get_bind is Session.get_bind
        return functools.partial(class_of(base, kinds, has_one_bind), **options)

    def check(self, engine: Engine) -> None:
        """Make one Session and throw it away, connecting to nothing.

        Raises:
            InvalidSetting: the options are none that Session takes.
        """
        if isinstance(self._factory, scoped_session):
            raise InvalidSetting(
                "session_factory is a scoped_session, which would give all units of work of a thread one Session. Give "
                "its own factory: Alchemy(app, session_factory=your_scoped_session.session_factory)."
            )
        if _makes_async_sessions(self._factory):
            raise InvalidSetting(
                "session_factory makes AsyncSessions. `async def` tasks too have an ordinary Session, inside an "
                "AsyncSession of ours. Give a sessionmaker or a Session class, or leave it out."
            )
        what = "session_factory and alchemy_session_options" if self._factory else "alchemy_session_options"
        with refused_as(InvalidSetting, f"{what} cannot be used to make a Session", self._options):
            first, second = self.new(bind=engine), self.new(bind=engine)
            if first is second:
                raise TypeError("it returned the same Session twice, but each unit of work needs one of its own")
            first.close()
            second.close()


def _make_checked(
    factory: MakeSession, kinds: tuple[type[Session], ...], options: dict[str, Any], **keywords: Any
) -> Session:
    session = factory(**options, **keywords)
    if not isinstance(session, Session):
        raise TypeError(f"session_factory returned {type(session).__name__}, not a sqlalchemy.orm.Session")
    if not isinstance(session, UnitSession):
        session.__class__ = class_of(type(session), kinds, False)
    return session


def _makes_async_sessions(factory: Any) -> bool:
    asynchronous: Any = sys.modules.get("sqlalchemy.ext.asyncio")  # whoever has made one has imported it
    if asynchronous is None:
        return False
    kinds = (asynchronous.async_sessionmaker, asynchronous.async_scoped_session)
    return isinstance(factory, kinds) or (isinstance(factory, type) and issubclass(factory, asynchronous.AsyncSession))
