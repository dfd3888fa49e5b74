"""Making Sessions: the options tasks need, and the events through which a unit of work follows its transaction."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Mapper, Session, SessionTransaction, scoped_session, sessionmaker

from ._sqlalchemy import ACTIVE, objects_of, provisions_of, root_of, savepoint_of
from .errors import InvalidSetting, refused_as
from .interrupts import shield
from .on_commit import CommitCallbacks
from .scope import SCOPE, current_scope, here

#: A `sessionmaker`, a Session class, or any callable that takes Session's keyword arguments.
MakeSession = Callable[..., Session]

#: Attribute of a Session: the unit of work it belongs to, or what waits for its COMMIT.
OWNER = "celery_alchemy_owner"

DEFAULTS: dict[str, Any] = {
    # An attribute read after the commit must not open a new transaction.
    "expire_on_commit": False,
    # A Session used after its task is a bug: raise instead of checking out a connection that nobody gives back.
    "close_resets_only": False,
}


class Owner(Protocol):
    """Whom a Session belongs to: a unit of work, or what waits for the COMMIT of a Session that is not ours."""

    @property
    def waiting(self) -> CommitCallbacks | None:
        """What waits for its COMMIT; None when nothing does."""

    committed: SessionTransaction | None
    """The transaction or savepoint whose COMMIT or RELEASE has just succeeded."""

    connected: int
    """Above 0: the Session has a connection."""

    opened: Session | None
    """The Session; None once it is released."""

    def rolled_back(self) -> None:
        """The Session was rolled back by hand."""

    def follow_transactions(self) -> None:
        """A transaction of the Session may be ended by other code from now on."""


class UnitSession(Session):
    """Session of a unit of work."""

    celery_alchemy_owner: Owner | None = None
    has_one_bind = False
    """No statement goes anywhere but to `bind`: there is nothing to be looked up."""

    def get_bind(
        self, mapper: Any = None, *, clause: Any = None, bind: Any = None, **keywords: Any
    ) -> Engine | Connection:
        owner = self.celery_alchemy_owner
        if owner is not None and not owner.connected:
            # Comes right before the checkout: so a connection is told from one that other code checks out.
            (getattr(current_scope(), SCOPE, None) or here()).connecting = owner
        if self.has_one_bind:
            only = self.bind
            if bind is None and only is not None:
                return only
            self.has_one_bind = False
        return super().get_bind(mapper, clause=clause, bind=bind, **keywords)

    def _connection_for_bind(self, engine: Any, execution_options: Any = None, **keywords: Any) -> Connection:
        # Each statement asks for the connection, and SQLAlchemy looks each time whether the transaction may get one.
        # Where it has one, and is active, it may: that is one percent of a statement. Where SQLAlchemy names this
        # method otherwise, nothing is lost but that.
        transaction = self._transaction
        if transaction is not None and self._trans_context_manager is None and not execution_options:
            state, connections = provisions_of(transaction)
            if state is ACTIVE and engine in connections:
                known: Connection = connections[engine][0]
                return known
        return super()._connection_for_bind(engine, execution_options, **keywords)

    def bind_mapper(self, mapper: Any, bind: Any) -> None:
        self.has_one_bind = False
        super().bind_mapper(mapper, bind)

    def bind_table(self, table: Any, bind: Any) -> None:
        self.has_one_bind = False
        super().bind_table(table, bind)

    def rollback(self) -> None:
        super().rollback()
        owner = owner_of(self)
        if owner is not None:
            owner.rolled_back()

    # What ends a transaction, or hands one out to be ended: the unit of work follows them from then on.

    def _hand_out(self) -> None:
        owner = self.celery_alchemy_owner
        if owner is not None and owner.opened is self:
            owner.follow_transactions()

    def begin(self, nested: bool = False) -> SessionTransaction:
        self._hand_out()
        return super().begin(nested)

    def begin_nested(self) -> SessionTransaction:
        self._hand_out()
        return super().begin_nested()

    def get_transaction(self) -> SessionTransaction | None:
        self._hand_out()
        return super().get_transaction()

    def get_nested_transaction(self) -> SessionTransaction | None:
        self._hand_out()
        return super().get_nested_transaction()

    def expunge_all(self) -> None:
        new, persistent = objects_of(self)
        if new or persistent:  # SQLAlchemy makes new, empty maps of what is empty
            super().expunge_all()


class DeferringSession(UnitSession):
    """The same for prefork: commit, rollback and close are never cut in two by a soft time limit.

    An interrupted COMMIT would be reported as a failure although the server has committed.
    """

    def commit(self) -> None:
        owner = owner_of(self)
        callbacks = owner.waiting if owner is not None else None
        if shield.depth and (callbacks is None or callbacks.held_back):
            super().commit()  # its unit of work ends, and holds the limit back
            return
        # Flushing may take long, and a time limit is right to stop it; the COMMIT itself is one answer.
        self.flush()
        if callbacks is not None:
            callbacks.held_back += 1
        shield.hold()
        try:
            super().commit()
        finally:
            shield.let_go()
            if callbacks is not None:
                callbacks.held_back -= 1
        if callbacks is not None:
            callbacks.run_ready()
        shield.check()

    def rollback(self) -> None:
        with shield:
            super().rollback()

    def close(self) -> None:
        if shield.depth:
            super().close()
            return
        with shield:
            super().close()


class AwaitedSession(UnitSession):
    """A Session for whose COMMIT something waits."""

    def commit(self) -> None:
        owner = self.celery_alchemy_owner
        if owner is not None and owner.waiting is not None and not owner.waiting.held_back:
            self._hand_out()  # not its unit of work commits, which knows by itself
        super().commit()

    def close(self) -> None:
        self._hand_out()
        super().close()

    def reset(self) -> None:
        self._hand_out()
        super().reset()

    def invalidate(self) -> None:
        self._hand_out()
        super().invalidate()


def shield_mapper_configuration() -> None:
    """Defer time limits while SQLAlchemy configures the mappers, at the first use of a model in a process.

    Cut in two, the configuration would leave the mappers unusable for good: every later task of the process would fail
    with "One or more mappers failed to initialize".
    """
    if not event.contains(Mapper, "before_configured", shield.hold):
        event.listen(Mapper, "before_configured", shield.hold)
        # Does not fire when the configuration fails; the end of the task lets go then.
        event.listen(Mapper, "after_configured", shield.let_go)


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
        factory = self._factory
        if factory is None:
            base: type[Session] = Session
            options = DEFAULTS
        elif isinstance(factory, sessionmaker):
            base, options = factory.class_, {**DEFAULTS, **factory.kw}
        elif isinstance(factory, type):
            base, options = factory, DEFAULTS
        else:
            return functools.partial(_make_checked, factory, self._kinds, {**DEFAULTS, **self._options})
        options = {**options, **self._options}
        options.pop("bind", None)
        has_one_bind = not options.get("binds") and base.get_bind is Session.get_bind
        return functools.partial(_class_of(base, self._kinds, has_one_bind), **options)

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
        if "async" in type(self._factory).__name__ or getattr(self._factory, "__name__", "").startswith("Async"):
            raise InvalidSetting(
                "session_factory makes AsyncSessions, but Celery tasks are ordinary functions. Give a sessionmaker, or "
                "leave it out."
            )
        what = "session_factory and alchemy_session_options" if self._factory else "alchemy_session_options"
        with refused_as(InvalidSetting, f"{what} cannot be used to make a Session", self._options):
            first, second = self.new(bind=engine), self.new(bind=engine)
            if first is second:
                raise TypeError("it returned the same Session twice, but each unit of work needs one of its own")
            first.close()
            second.close()


_classes: weakref.WeakKeyDictionary[type[Session], dict[object, type[Any]]] = weakref.WeakKeyDictionary()


def _class_of(base: type[Session], kinds: tuple[type[UnitSession], ...], has_one_bind: bool) -> type[UnitSession]:
    """Return `base` as one of these kinds; made once, for SQLAlchemy remembers every Session class it has listened
    to."""
    made = _classes.setdefault(base, {})
    key = (kinds, has_one_bind)
    if key not in made:
        bases = kinds if issubclass(kinds[-1], base) else (*kinds, base)
        made[key] = type(base.__name__, bases, {"has_one_bind": has_one_bind})
    return made[key]


def become(session: Session, kind: type[Session]) -> None:
    """Let `session`, which has not been used, be one of `kind` too."""
    if isinstance(session, kind):
        return
    base = type(session)
    made = _classes.setdefault(base, {})
    if kind not in made:
        made[kind] = type(base.__name__, (kind, base), {})
    session.__class__ = made[kind]


def _make_checked(
    factory: MakeSession, kinds: tuple[type[UnitSession], ...], options: dict[str, Any], **keywords: Any
) -> Session:
    session = factory(**options, **keywords)
    if not isinstance(session, Session):
        raise TypeError(f"session_factory returned {type(session).__name__}, not a sqlalchemy.orm.Session")
    if not isinstance(session, UnitSession):
        session.__class__ = _class_of(type(session), kinds, False)
    return session


def owner_of(session: Session) -> Owner | None:
    """Return the unit of work of `session`; None where it has none."""
    return getattr(session, OWNER, None)


def waiting_of(session: Session) -> CommitCallbacks | None:
    """Return what waits for the COMMIT of `session`; None when nothing ever did."""
    owner = owner_of(session)
    return owner.waiting if owner is not None else None


def watch_commits(session: Session) -> None:
    """Tell the callbacks of the unit of work of `session` when a transaction or savepoint of it ends.

    On this Session alone, and only when a callback waits: on the class, every task would pay 5 us for it.
    """
    if not event.contains(session, "after_commit", _after_commit):
        event.listen(session, "after_transaction_end", _after_end)  # first: a time limit may strike between the two
        event.listen(session, "after_commit", _after_commit)


def _after_commit(session: Session) -> None:
    owner = owner_of(session)
    if owner is not None:
        # Fires for the release of a savepoint too, while it is still the innermost.
        owner.committed = savepoint_of(session) or root_of(session)


def _after_end(session: Session, transaction: SessionTransaction) -> None:
    owner = owner_of(session)
    if owner is None or not (transaction.parent is None or transaction.nested):
        return
    committed, owner.committed = owner.committed is transaction, None
    if owner.waiting is not None:
        owner.waiting.ended(transaction, committed=committed)
