"""Making Sessions: the options tasks need, and the events through which a unit of work follows its transaction."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Mapper, Session, SessionTransaction, scoped_session, sessionmaker
from sqlalchemy.orm.session import SessionTransactionState

from .errors import InvalidSetting, refused_as
from .interrupts import shield

if TYPE_CHECKING:
    from .on_commit import CommitCallbacks
    from .unit_of_work import UnitOfWork

SessionFactory = Callable[..., Session]

#: Key in `Session.info` of the unit of work a Session belongs to.
UNIT = "celery_alchemy.unit"

DEFAULTS: dict[str, Any] = {
    # An attribute read after the commit must not open a new transaction.
    "expire_on_commit": False,
    # A Session used after its task is a bug: raise instead of checking out a connection that nobody gives back.
    "close_resets_only": False,
}


class UnitSession(Session):
    """Session whose commit, rollback and close are never cut in two by a soft time limit.

    An interrupted COMMIT would be reported as a failure although the server has committed.
    """

    def commit(self) -> None:
        if self.twophase and self._commits_alone():
            self.twophase = False
            try:
                self.commit()
            finally:
                self.twophase = True
            return
        if not shield.installed:
            super().commit()
            return
        # Flushing may take long, and a time limit is right to stop it; the COMMIT itself is one answer.
        self.flush()
        callbacks = waiting_of(self)
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

    def _commits_alone(self) -> bool:
        """Tell whether this COMMIT is of one database, and nothing has been prepared: two phases would cost a round
        trip, and let nobody agree."""
        return not is_prepared(self) and len(connections_of(self)) <= 1

    def rollback(self) -> None:
        with shield:
            super().rollback()
        unit: UnitOfWork | None = self.info.get(UNIT)
        if unit is not None:
            unit.rolled_back()

    def close(self) -> None:
        if not shield.installed:
            super().close()
            return
        with shield:
            super().close()


def shield_mapper_configuration() -> None:
    """Defer time limits while SQLAlchemy configures the mappers, at the first use of a model in a process.

    Cut in two, the configuration would leave the mappers unusable for good: every later task of the process would fail
    with "One or more mappers failed to initialize".
    """
    if not event.contains(Mapper, "before_configured", shield.hold):
        event.listen(Mapper, "before_configured", shield.hold)
        # Does not fire when the configuration fails; the end of the task lets go then.
        event.listen(Mapper, "after_configured", shield.let_go)


class SessionSource:
    """Where Sessions come from: SQLAlchemy's sessionmaker with our defaults, or the user's `session_factory`.

    Args:
        factory: A `sessionmaker`, a Session class, or any callable that takes Session's keyword arguments.
        options: Keyword arguments of Session (`alchemy_session_options`); they win over the defaults, and over those
            of a `sessionmaker`.
    """

    def __init__(self, factory: SessionFactory | None, options: dict[str, Any]) -> None:
        self._options = options
        self._factory = factory
        self._make: SessionFactory | None = None

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

    def use_two_phase(self) -> None:
        """Let every Session begin its transactions so that they can be prepared."""
        self._options = {**self._options, "twophase": True}

    def new(self, bind: Engine | Connection, **more: Any) -> Session:
        """Return a new Session bound to `bind`; it connects with its first statement."""
        if self._make is None:
            self._make = self._prepare()
        return self._make(bind=bind, **more)

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
            first, second = self.new(engine), self.new(engine)
            if first is second:
                raise TypeError("it returned the same Session twice, but each unit of work needs one of its own")
            first.close()
            second.close()

    def _prepare(self) -> SessionFactory:
        factory = self._factory
        if factory is None:
            base: type[Session] = Session
            options = DEFAULTS
        elif isinstance(factory, sessionmaker):
            base, options = factory.class_, {**DEFAULTS, **factory.kw}
        elif isinstance(factory, type):
            base, options = factory, DEFAULTS
        else:
            return functools.partial(_make_checked, factory, {**DEFAULTS, **self._options})
        options = {**options, **self._options}
        options.pop("bind", None)
        return functools.partial(_with_unit(base), **options)


_mixed: weakref.WeakKeyDictionary[type[Session], type[UnitSession]] = weakref.WeakKeyDictionary()


def _with_unit(base: type[Session]) -> type[UnitSession]:
    """Return `base` as a UnitSession; made once, for SQLAlchemy remembers every Session class it has listened to."""
    if issubclass(UnitSession, base):
        return UnitSession
    if base not in _mixed:
        _mixed[base] = type(base.__name__, (UnitSession, base), {})
    return _mixed[base]


def _make_checked(factory: SessionFactory, options: dict[str, Any], **keywords: Any) -> Session:
    session = factory(**options, **keywords)
    if not isinstance(session, Session):
        raise TypeError(f"session_factory returned {type(session).__name__}, not a sqlalchemy.orm.Session")
    return session


def waiting_of(session: Session) -> CommitCallbacks | None:
    """Return what waits for the COMMIT of `session`; None when nothing ever did."""
    unit: UnitOfWork | None = session.info.get(UNIT)
    return unit.waiting if unit is not None else None


def is_committing(session: Session) -> bool:
    """Tell whether `session` is reporting a COMMIT or RELEASE that has just succeeded."""
    transaction = session.get_nested_transaction() or session.get_transaction()
    return transaction is not None and transaction._state is SessionTransactionState.COMMITTED


def is_prepared(session: Session) -> bool:
    """Tell whether the transaction of `session` has been prepared, and waits for its second phase."""
    transaction = session.get_transaction()
    return transaction is not None and transaction._state is SessionTransactionState.PREPARED


def watch_commits(session: Session) -> None:
    """Tell the callbacks of the unit of work of `session` when a transaction or savepoint of it ends.

    On this Session alone, and only when a callback waits: on the class, every task would pay 5 us for it.
    """
    event.listen(session, "after_commit", _after_commit)
    event.listen(session, "after_transaction_end", _after_end)


def watch_statements(session: Session, listener: Callable[..., None], ended: Callable[[], None]) -> None:
    """Call `listener` with the arguments of `before_cursor_execute` for every statement of `session`, and `ended`
    whenever a transaction is over."""

    def after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        if transaction.parent is None:
            event.listen(connection, "before_cursor_execute", listener)

    def after_end(session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            ended()

    event.listen(session, "after_begin", after_begin)
    event.listen(session, "after_transaction_end", after_end)


def connections_of(session: Session) -> list[Connection]:
    """Return the connections that the transaction of `session` holds; never acquires one."""
    transaction = session.get_transaction()
    if transaction is None:
        return []
    # Keyed on both Engine and Connection. `SessionTransaction.connections` is there since SQLAlchemy 2.1.7 only.
    return [key for key in transaction._connections if isinstance(key, Connection)]


def _after_commit(session: Session) -> None:
    unit: UnitOfWork | None = session.info.get(UNIT)
    if unit is not None:
        # Fires for the release of a savepoint too, while it is still the innermost.
        unit.committed = session.get_nested_transaction() or session.get_transaction()


def _after_end(session: Session, transaction: SessionTransaction) -> None:
    unit: UnitOfWork | None = session.info.get(UNIT)
    if unit is None or not (transaction.parent is None or transaction.nested):
        return
    committed, unit.committed = unit.committed is transaction, None
    if unit.waiting is not None:
        unit.waiting.ended(transaction, committed=committed)
