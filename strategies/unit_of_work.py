"""One unit of work: the Session opened on first use, and how each ending treats its transaction.

Commit and rollback live here and nowhere else. A unit of work is ended by exactly one of `succeed` and `fail`; `close`
always follows, and undoes whatever is left when neither got to run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction

from .engines.abandon import abandon
from .engines.cancelling import cancel_running
from .errors import RollBack
from .failed_transaction import refuse_broken
from .features.new_session import set_up
from .features.read_only import IN_TRANSACTION, ReadOnly
from .features.uncommitted import Writes
from .interrupts import is_interrupt, is_kill, shield
from .on_commit import Callback, CommitCallbacks, Runner, heir_of
from .sessions import UNIT, connections_of, is_committing, is_prepared, watch_commits

if TYPE_CHECKING:
    from .base import SessionStrategy
    from .several.several_units import Parts
    from .watching.activity import Activity

logger = logging.getLogger(__name__)

#: A name, or the two parts of `task name[task id]`, put together only when a message needs them.
Label = str | tuple[str, str]


class UnitOfWork:
    """What one task request, hook or `unit_of_work()` block does in the database, from first statement to release.

    Args:
        strategy: Opens and releases the Session.
        label: Names it in messages.
        commits: False: a good ending rolls back, and warns when that undoes something.
        outermost: No other is open in this thread or greenlet.
        read_only: True: no transaction, and no writing; "transaction": one that may not write.
        run_callback: Runs one `on_commit` callable in a unit of work of its own.
    """

    # Defaults on the class: most units of work use few of them, and each is made for every task request.
    committed: SessionTransaction | None = None
    """The transaction or savepoint whose COMMIT or RELEASE has just succeeded."""
    parts: Parts | None = None
    """What it does on other databases; None while it has used none."""
    decision: tuple[str, str] | None = None
    decider: UnitOfWork | None = None
    stays_prepared = False
    """Of two-phase commit: the names of the transactions; itself or the part whose database decides; only `in_doubt`
    may end this one."""
    notes_commits = has_committed = False
    """Whether each COMMIT is to be noted, and whether there was one, by the task's own code too."""
    kept: Any = None
    """What its strategy keeps with it."""
    activity: Activity | None = None
    outcome = "nothing"
    """How it has ended: "committed", "rolled back", or "nothing" where there was no transaction."""
    _whole: UnitOfWork | None = None
    waiting: CommitCallbacks | None = None
    """What waits for the COMMIT; None when nothing does."""
    _session: Session | None = None
    _unwatched = False
    _writes: Writes | None = None
    _error: tuple[BaseException, SessionTransaction | None] | None = None
    _lost: SessionTransaction | None = None

    def __init__(
        self,
        strategy: SessionStrategy,
        label: Label,
        commits: bool,
        outermost: bool,
        run_callback: Runner,
        read_only: ReadOnly = False,
    ) -> None:
        self.strategy = strategy
        self.commits = commits
        self.outermost = outermost
        self.read_only: ReadOnly = read_only
        self._label = label
        self._run_callback = run_callback

    def new_part(self, strategy: SessionStrategy) -> UnitOfWork:
        """Return a unit of work on another database that is to end with this one."""
        read_only = IN_TRANSACTION if self.read_only and strategy.engines.terms.external_pooler else self.read_only
        part = UnitOfWork(strategy, self._label, self.commits, self.outermost, self._run_callback, read_only)
        part._whole, part.notes_commits = self, self.notes_commits
        return part

    @property
    def whole(self) -> UnitOfWork:
        """The unit of work that this one is a part of; itself when it is none."""
        return self._whole or self

    @property
    def all_parts(self) -> Iterable[UnitOfWork]:
        """This unit of work, and those on other databases that end with it."""
        return (self,) if self.parts is None else (self, *self.parts)

    @property
    def database(self) -> str:
        """The name of its database."""
        return self.strategy.engines.terms.database

    @property
    def label(self) -> str:
        """The name of this unit of work, for messages."""
        label = self._label
        name = label if isinstance(label, str) else f"{label[0]}[{label[1]}]"
        return name if self._whole is None else f"{name} on the database {self.database!r}"

    @property
    def session(self) -> Session:
        """The Session of this unit of work, opened on first use; it connects with its first statement."""
        session = self._session
        if session is None:
            if shield.installed:
                with shield:  # a pool process makes its Engine now
                    session = self.strategy.open(self)
            else:
                session = self.strategy.open(self)
            set_up(session, self)
            if self.waiting is not None and self.read_only is not True:
                watch_commits(session)
                self._unwatched = False
            if not self.commits:
                self._writes = Writes(session)
            self._session = session
        elif self._unwatched:
            self._watch()
        return session

    @property
    def opened(self) -> Session | None:
        """The Session if it has been used, else None."""
        return self._session

    def on_commit(self, callback: Callback, *, raises: bool = False) -> None:
        """Run `callback()` after the next real COMMIT; at once where that is just being reported.

        Args:
            raises: Its error is raised to whoever commits; otherwise it is logged only.
        """
        session = self._session
        savepoint = session.get_nested_transaction() if session is not None else None
        releasing = session is not None and is_committing(session)
        if releasing and savepoint is None:
            (self.waiting or CommitCallbacks(self._run_callback)).run_now(callback, raises=raises)
            return
        if self.waiting is None:
            self.waiting = CommitCallbacks(self._run_callback)
            self._unwatched = True
        if releasing and savepoint is not None:
            # SQLAlchemy's list of listeners is in use just now; and what is registered here, the parent owns.
            savepoint = heir_of(savepoint)
        else:
            self._watch()
        self.waiting.add(callback, savepoint, raises=raises)

    def _watch(self) -> None:
        # Not while SQLAlchemy calls the listeners of this event.
        if self.read_only is True:
            return  # there is no COMMIT to wait for: they run when the unit of work ends well
        if self._unwatched and self._session is not None and not is_committing(self._session):
            self._unwatched = False
            watch_commits(self._session)

    def forget_session(self) -> None:
        """Open a new Session on next use: the old one is closed (`scoped_session.remove()`, a lost connection)."""
        session, self._session = self._session, None
        if session is not None:
            session.info.pop(UNIT, None)

    # -- the endings -------------------------------------------------------------------------------------------------

    def succeed(self, *, final: bool) -> None:
        """End well: commit, or roll back where `commits` is False; then run the `on_commit` callables.

        Args:
            final: Nothing comes after: the Session is released before the callables run, so that one which kept it gets
                an error, and does not write where nobody commits.

        Raises:
            BrokenTransaction: a database error was caught and nobody rolled back.
            Exception: whatever the COMMIT failed with; the transaction is rolled back.
        """
        if self.parts is not None:
            self.parts.succeed(final=final)
            return
        self.end_well()
        if self.waiting is not None:
            if final:
                self.close()
            self._run_callbacks(self.waiting)

    def end_well(self) -> None:
        """Commit, or roll back where `commits` is False: this database alone, and no callback yet."""
        session = self._session
        if session is not None and self.read_only is True:
            self._refuse_writes(session)
        elif session is None or not session.in_transaction():
            pass
        elif not self.commits:
            self._roll_back_unasked(session)
        else:
            prepared = is_prepared(session)
            try:
                self.prepare_own()
                if self.waiting is None and not shield.installed:
                    session.commit()
                else:
                    with self._callbacks_held_back(), shield.quiet():
                        session.commit()
            except BaseException as error:
                self.stays_prepared = prepared
                self.fail_own(error)
                raise
            self.outcome = "committed"

    def run_waiting(self) -> None:
        """Run the `on_commit` callables that `end_well` has set free."""
        if self.waiting is not None:
            self._run_callbacks(self.waiting)

    def _refuse_writes(self, session: Session) -> None:
        """Let what waits to be written be refused: nothing commits, so nothing else would flush it."""
        try:
            session.flush()
        except BaseException as error:
            self.fail_own(error)
            raise

    @shield.covers
    def _run_callbacks(self, waiting: CommitCallbacks) -> None:
        if not (shield.applies and shield.depth):
            waiting.run_all()
            return
        # At the end of a task the limit is held back, but callbacks send messages, and sending may hang.
        shield.depth -= 1
        try:
            waiting.run_all()
        except Exception as error:
            if not is_interrupt(error):
                raise
            logger.warning("%s: %s in an on_commit callback; its work is committed", self.label, type(error).__name__)
        finally:
            shield.depth += 1

    def prepare(self) -> None:
        """Do what may take long before the COMMIT, which is one answer: a time limit is right to stop it.

        Raises:
            BrokenTransaction: as `succeed` does.
        """
        if self.parts is not None:
            self.parts.prepare()
        else:
            self.prepare_own()

    def prepare_own(self, *, flush: bool = False) -> None:
        """Prepare this database alone; with `flush`, write even where no time limit makes that worth while."""
        session = self._session
        if session is not None and self.commits and session.in_transaction() and self.read_only is not True:
            if is_prepared(session):
                return
            refuse_broken(session, lambda: self.label, self._error, self._lost)
            if flush or shield.installed:
                session.flush()

    @contextlib.contextmanager
    def _callbacks_held_back(self) -> Iterator[None]:
        waiting = self.waiting
        if waiting is not None:
            waiting.held_back += 1
        try:
            yield
        finally:
            if waiting is not None:
                waiting.held_back -= 1

    def fail(self, error: BaseException) -> None:
        """End badly: roll back and give the connection back. Never raises an Exception that would hide `error`."""
        if self.parts is not None:
            self.parts.fail(error)
        else:
            self.fail_own(error)

    def fail_own(self, error: BaseException) -> None:
        """End badly on this database alone."""
        if self.waiting is not None:
            self.waiting.drop()
        session = self._session
        if session is None or not session.in_transaction():
            return
        self.outcome = "rolled back"
        with shield.quiet():
            held = connections_of(session)
            if is_kill(error):
                for connection in held:
                    abandon(connection)
            if self.stays_prepared or is_kill(error) or (is_interrupt(error) and cancel_running(session)):
                self._discard(session, held)
                return
            try:
                session.rollback()
            except BaseException as cleanup_error:
                self._discard(session, held)
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
        if self.parts is not None:
            self.parts.close()
        else:
            self.close_own()

    def close_own(self) -> None:
        """Release the Session of this database alone."""
        session, self._session = self._session, None
        if session is not None:
            held = connections_of(session) if session.in_transaction() else []
            try:
                with shield.quiet():
                    self.strategy.release(self, session)
            except Exception:
                logger.warning("%s: closing its Session failed; its connection is discarded", self.label, exc_info=True)
                self._discard(session, held)
            session.info.pop(UNIT, None)
        self._error = None

    # -- what the Session's events tell ------------------------------------------------------------------------------

    def rolled_back(self) -> None:
        """The user rolled back: what was wrong is undone, and what waited for a commit waits in vain."""
        if self.waiting is not None:
            self.waiting.drop()

    def observed(self, error: BaseException, lost: bool) -> None:
        """The driver reported `error`; with `lost` the server has rolled the whole transaction back."""
        transaction = self._session.get_transaction() if self._session is not None else None
        self._error = (error, transaction)
        if lost:
            self._lost = transaction

    # -- details -----------------------------------------------------------------------------------------------------

    def _roll_back_unasked(self, session: Session) -> None:
        wrote = self._writes is not None and self._writes.found_in(session)
        dropped = self.waiting.drop() if self.waiting is not None else 0
        self.fail_own(RollBack())
        if wrote:
            logger.warning(
                "%s returned with uncommitted changes, and commit_on_success is False: they are rolled back. "
                "Call self.db.commit(), or set commit_on_success=True.",
                self.label,
            )
        if dropped:
            logger.warning(
                "%s: %d on_commit callback(s) dropped: commit_on_success is False and its transaction was rolled back",
                self.label,
                dropped,
            )

    def _discard(self, session: Session, connections: list[Connection]) -> None:
        """Throw the connections away: their state is unknown, and their slots must come back."""
        if is_prepared(session) and self.whole.decider not in {None, self}:
            self.whole.decider.stays_prepared = True  # while it is, this one is rolled back
        for connection in connections:
            with contextlib.suppress(Exception):
                connection.invalidate()
            with contextlib.suppress(Exception):
                connection.close()
        with contextlib.suppress(Exception):
            session.invalidate()
        self.forget_session()
