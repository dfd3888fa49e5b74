"""One unit of work: the Session opened on first use, and how each ending treats its transaction.

Commit and rollback live here and nowhere else. A unit of work is ended by exactly one of `succeed` and `fail`; `close`
always follows, and undoes whatever is left when neither got to run. Features follow it as `UnitHook`s.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry

from . import lost_work
from ._sqlalchemy import (
    CLOSE_STATE,
    CLOSED,
    NOTHING,
    has_changes,
    held_by,
    is_committing,
    provisions_of,
    remains_of,
    root_of,
    savepoint_of,
)
from .base import SessionStrategy
from .core_transactions import follow_connections
from .engines import failed_transaction
from .engines.abandon import abandon, throw_away
from .engines.cancelling import cancel_running
from .entry import Entry, Label, UnitOptions, written
from .errors import RollBack
from .interrupts import is_interrupt, is_kill
from .on_commit import Callback, CommitCallbacks, hands_out_transactions, heir_of
from .sessions import ONE_CONNECTION, OWNER, UnitSession, become, commit_failed, watch_commits

logger: logging.Logger = logging.getLogger(__name__)


class UnitOfWork(Entry):
    """What one task request, hook or `unit_of_work()` block does in the database, from first statement to release.

    Whoever begins it (`UnitOfWorkRegistry.begin`) sets what has no value here.
    """

    owns = ends = True
    strategy: SessionStrategy
    """Opens and releases the Session."""
    options: UnitOptions
    """How it is treated."""
    titled: Label  # What `label` is made of
    began: float  # By time.monotonic()
    outcome: str = "nothing"
    committed: SessionTransaction | None = None
    """The transaction or savepoint whose COMMIT or RELEASE has just succeeded."""
    waiting: CommitCallbacks | None = None
    """What waits for the COMMIT; None when nothing does."""
    connected: int = 0
    """Above 0: its Session has checked a connection out. Above 1: and has begun a two-phase transaction on it."""
    held: Sequence[ConnectionPoolEntry] = ()
    """What its thread or greenlet had checked out when it began."""
    outermost = True
    """No other is open in this thread or greenlet."""
    awaits = False  # It is a coroutine's: callbacks may be `async def`
    activity: Any = None
    """What `watching` has seen of its statements; None where it does not look."""
    closed_early: str | None = None
    """The line of code that has closed its Session with work in it."""
    leaked = 0
    """Connections that its code had checked out and kept, and that were taken back."""
    _follows = _gives_connections = _unwatched = False
    _error: tuple[BaseException, SessionTransaction | None] | None = None

    @property
    def unit(self) -> UnitOfWork:
        return self

    @property
    def all_units(self) -> Iterable[UnitOfWork]:
        """This unit of work, and those on other databases that end with it."""
        return (self,)

    @property
    def commits(self) -> bool:
        """Whether a good ending commits."""
        return self.options.commits

    @property
    def read_only(self) -> Any:
        """As in its options."""
        return self.options.read_only

    @functools.cached_property
    def info(self) -> dict[str, Any]:
        """What features keep with it."""
        return {}

    @property
    def database(self) -> str:
        """The name of its database."""
        return self.strategy.engines.options.database

    @property
    def label(self) -> str:
        """The name of this unit of work, for messages."""
        return written(self.titled)

    @property
    def session(self) -> Session:
        """The Session of this unit of work, opened on first use; it connects with its first statement."""
        session = self.opened
        if session is None:
            if self.closed_early is not None:
                self.refuse_closed()
            strategy = self.strategy
            new, kind = strategy.new_session, self.options.session_kind
            if new is None:
                session = strategy.open(self)
                become(session, UnitSession)
            else:
                new = new if kind is None else strategy.sessions.new_as(kind)
                session = new(bind=strategy._engine or strategy.engine)
            setattr(session, OWNER, self)
            for hook in self.options.hooks:
                hook.opened(self, session)
            self.opened = session
            if self.waiting is not None:
                self._await()
        if self._unwatched:
            self._watch()
        self.ready: Any = None if self._unwatched else session
        return session

    # -- what waits for the COMMIT -----------------------------------------------------------------------------------

    def on_commit(self, callback: Callback, *, raises: bool = False) -> None:
        """Run `callback()` after the next real COMMIT; at once where that is just being reported.

        Args:
            raises: Its error is raised to whoever commits; otherwise it is logged only.
        """
        session = self.opened
        savepoint = None
        if session is not None:
            savepoint = savepoint_of(session) if self._follows else None
            if is_committing(session):
                if savepoint is None:
                    (self.waiting or CommitCallbacks(self.registry.run_callback)).run_now(callback, raises=raises)
                    return
                savepoint = heir_of(savepoint)  # what is registered here, the parent owns
            elif self.waiting is not None and not self._follows:
                self._await()
        if self.waiting is None:
            self.waiting = CommitCallbacks(self.registry.run_callback)
            self._await()
        within = follow_connections(session) if self._gives_connections and session is not None else ()
        self.waiting.add(callback, savepoint, raises=raises, within=within)

    def _await(self) -> None:
        if self.opened is not None and hands_out_transactions(self.opened):
            self._follows = self._gives_connections = True
        if self._follows:
            self._watch()

    def follow_transactions(self) -> None:
        """Its code may end a transaction or savepoint itself: what waits for a COMMIT must follow each of them."""
        self._follows = True
        self._watch()

    def follow_connections(self) -> None:
        """Its code may end the transaction, or a savepoint, by the methods of a Connection."""
        self._gives_connections = True
        if self.waiting is not None and self.opened is not None:
            follow_connections(self.opened)

    def _watch(self) -> None:
        # Not while SQLAlchemy calls the listeners of this event.
        if self.waiting is None or self.opened is None:
            return
        self._unwatched = is_committing(self.opened)
        if self._unwatched:
            self.ready = None
        elif self.options.read_only is not True:  # else there is no COMMIT to wait for: they run at a good end
            watch_commits(self.opened)

    def drop_callbacks(self) -> int:
        """Forget what waits for the COMMIT; return how many callables there were."""
        return self.waiting.drop() if self.waiting is not None else 0

    def forget_session(self) -> None:
        """Open a new Session on next use: the old one is closed (`scoped_session.remove()`, a lost connection)."""
        session, self.opened, self.ready = self.opened, None, None
        if session is not None:
            setattr(session, OWNER, None)

    # -- the endings -------------------------------------------------------------------------------------------------

    def succeed(self, *, final: bool) -> None:
        """End well: commit, or roll back where `commits` is False; then run the `on_commit` callables.

        Args:
            final: Nothing comes after: the Session is released before the callables run, so that one which kept it gets
                an error, and does not write where no commit follows.

        Raises:
            BrokenTransaction: a database error was caught, and the transaction was not rolled back.
            Exception: whatever the COMMIT failed with; the transaction is rolled back.
        """
        if self.closed_early is not None:
            self.refuse_closed()
        if self.opened is not None or self.options.hooks:
            self.end_well()
            if final:
                self.close()
        if self.waiting is not None:
            self.run_waiting()

    def end_well(self) -> None:
        """Commit, or roll back where `commits` is False: this database alone, and no callback yet."""
        try:
            for hook in self.options.hooks:
                hook.before_commit(self)
            session = self.opened
            if session is None or (transaction := root_of(session)) is None:
                return
            if self._error is not None:
                self.refuse_failed(session)
            if self.waiting is None:
                self.commit(session, transaction)
            else:
                self.waiting.held_back += 1
                try:
                    self.commit(session, transaction)
                    self.waiting.set_free()  # to be run at the end: what is committed now is not dropped any more
                finally:
                    self.waiting.held_back -= 1
        except BaseException as error:
            self.fail_alone(error)
            raise
        self.outcome = "committed"

    def commit(self, session: Session, transaction: SessionTransaction) -> None:
        """Send the COMMIT of `transaction`: as `Session.commit` of ours, but for what others need who call that."""
        commits = self.scope.commits
        if (entries := len(provisions_of(transaction)[1])) > ONE_CONNECTION:
            self.refuse_failed(session)  # before the COMMIT of any
        try:
            super(UnitSession, session).commit()  # type: ignore[misc]
        except Exception as error:
            commit_failed(session, transaction, error, commits)
        if not session.may_have_written:  # type: ignore[attr-defined]
            self.scope.commits -= entries // ONE_CONNECTION  # its own: only what may have written counts

    def refuse_failed(self, session: Session) -> None:
        """Refuse a transaction of `session` that has failed before.

        Raises:
            BrokenTransaction: it has.
        """
        failed_transaction.refuse_if_failed(session, self.label, self._error)

    def refuse_closed(self) -> None:
        """Refuse to go on where code has closed the Session with work in it.

        Raises:
            SessionClosedEarly: it has.
        """
        if self.closed_early is not None:
            error = lost_work.error_for(self.label, self.closed_early)
            self.fail(error)
            raise error

    def run_waiting(self) -> None:
        """Run the `on_commit` callables that `end_well` has set free."""
        if self.waiting is not None:
            self.waiting.run_all()

    def prepare(self) -> None:
        """Do what may take long before the COMMIT, which is one answer: a time limit is right to stop it.

        Raises:
            BrokenTransaction: as `succeed` does.
        """
        session, options = self.opened, self.options
        if session is None or not options.commits or options.read_only or (transaction := root_of(session)) is None:
            return
        if self._error is not None:
            self.refuse_failed(session)
        if has_changes(session):
            try:
                session.flush()
            except Exception as error:
                commit_failed(session, transaction, error, self.scope.commits)

    def fail(self, error: BaseException) -> None:
        """End badly: roll back and give the connection back. Never raises an Exception that would hide `error`."""
        self.fail_alone(error)

    def fail_alone(self, error: BaseException) -> None:
        """End badly on this database alone."""
        self.drop_callbacks()
        session = self.opened
        if session is None or not session.in_transaction():
            return
        self.outcome = "rolled back"
        held = held_by(root_of(session))
        for connection in held if is_kill(error) else ():
            abandon(connection)
        if self.must_discard() or is_kill(error) or (is_interrupt(error) and cancel_running(session)):
            self.discard(session, held)
            return
        try:
            session.rollback()
        except BaseException as cleanup_error:
            self.discard(session, held)
            if not isinstance(cleanup_error, Exception):
                raise
            logger.warning(
                "%s: rolling back after %s failed too (%s: %s); its connection is discarded",
                self.label, type(error).__name__, type(cleanup_error).__name__, cleanup_error,
            )  # fmt: skip

    def roll_back(self) -> None:
        """Roll back and give the connection back now; the unit of work goes on (before a retry is published)."""
        self.fail(RollBack())

    def close(self) -> None:
        """Release the Session. After `succeed` and `fail` nothing is open any more; otherwise it is rolled back."""
        session, self.opened, self.ready = self.opened, None, None
        if session is None:
            return
        plain = self.strategy.new_session is not None
        if plain and session.closes_plainly and remains_of(session) == NOTHING:  # type: ignore[attr-defined]
            setattr(session, CLOSE_STATE, CLOSED)  # as `Session.close` would, in four calls
        else:
            self._release(session, plain=plain)
        setattr(session, OWNER, None)
        self._error = None

    def _release(self, session: Session, *, plain: bool) -> None:
        transaction = root_of(session)
        try:
            if plain:
                super(UnitSession, session).close()  # type: ignore[misc]
            else:
                self.strategy.release(self, session)
        except Exception:
            logger.warning("%s: closing its Session failed; its connection is discarded", self.label, exc_info=True)
            self.discard(session, held_by(transaction))

    # -- what the Session's events tell ------------------------------------------------------------------------------

    def rolled_back(self) -> None:
        """The user rolled back: what was wrong is undone, and what waited for a commit waits in vain."""
        self.drop_callbacks()

    def observed(self, error: BaseException) -> None:
        """The driver reported `error`."""
        self._error = (error, root_of(self.opened) if self.opened is not None else None)

    def explained(self, error: Exception, transaction: SessionTransaction | None) -> BaseException:
        """Return what is to be raised instead of `error`, with which the COMMIT of `transaction` has failed."""
        return failed_transaction.explained(error, self.label, transaction, self._error)

    def listener_failed(self, error: Exception) -> None:
        """A listener of the user's has failed after the COMMIT: what is committed is."""
        logger.error("%s is committed; after that a listener failed", self.label, exc_info=error)

    def closing(self, session: Session) -> None:
        """Code closes the Session, which is not its own to close."""
        if self.waiting is not None:
            self.follow_transactions()
        if self.closed_early is None and self.options.read_only is not True:
            self.closed_early = lost_work.place_of_loss(session, self.label, self.commits)

    # -- for subclasses: several databases, soft time limits ---------------------------------------------------------

    def part_of(self, registry: Any, strategy: Callable[[], SessionStrategy], position: int) -> UnitOfWork:
        """Return what it does on another database, that of `registry`; `position` is its place among the COMMITs."""
        raise NotImplementedError(f"{self.label} is over one database")

    def after_end(self, error: BaseException | None) -> None:
        """It is off the stack, and its connection is back; called where it failed with `error`, or `has_parts`."""

    def must_discard(self) -> bool:
        """Tell whether its connections may not even be rolled back."""
        return False

    def discard(self, session: Session, connections: list[Connection]) -> None:
        """Throw the connections away: their state is unknown, and their slots must come back."""
        throw_away(connections)
        self.forget_session()
        with contextlib.suppress(Exception):
            session.invalidate()
