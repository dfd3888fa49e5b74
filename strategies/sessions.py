"""The Sessions of units of work: what they tell, and what is done when code ends them itself."""

from __future__ import annotations

import contextlib
import functools
import re
import weakref
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.sql.expression import TextClause, TextualSelect

from ._sqlalchemy import (
    ACTIVE,
    CLOSING_METHODS,
    COMMITTED,
    ORIGINS,
    SNAPSHOT_MAPS,
    SUBTRANSACTION,
    SnapshotMap,
    has_changes,
    is_over,
    listen_to,
    objects_of,
    provisions_of,
    root_of,
    savepoint_of,
)
from .closing import has_written_in, told
from .lost_work import error_for
from .on_commit import CommitCallbacks
from .owner import Owner
from .scope import SCOPE, Scope, current_scope, here

#: Attribute of a Session: the unit of work it belongs to, or what waits for its COMMIT.
OWNER = "celery_alchemy_owner"

ONE_CONNECTION = 2
"""Entries among the connections of a transaction: each stands there by itself, and by its Engine."""


class UnitSession(Session):
    """Session of a unit of work."""

    celery_alchemy_owner: Owner | None = None
    has_one_bind: bool = False
    """No statement goes anywhere but to `bind`: there is nothing to be looked up."""
    closes_plainly: bool = False
    """No class of the user's has a say in how it is closed."""
    may_have_written: bool = False
    """Something else than a SELECT was executed in this transaction, or somebody has its connection."""
    is_told = False
    """A transaction of it is being closed or rolled back, and it is known what that loses."""

    def get_bind(
        self, mapper: Any = None, *, clause: Any = None, bind: Any = None, **keywords: Any
    ) -> Engine | Connection:
        owner = self.celery_alchemy_owner
        if owner is not None and not owner.connected:
            # Comes right before the checkout: so a connection is told from one that other code checks out.
            (getattr(current_scope(), SCOPE, None) or here()).connecting = owner
            self.may_have_written = False
        if not self.may_have_written and (mapper is not None if clause is None else not clause.is_select):
            self.may_have_written = clause is None or may_write(clause)  # a flush asks for a mapper alone
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

    def connection(self, *args: Any, **keywords: Any) -> Connection:
        found = super().connection(*args, **keywords)
        self.may_have_written = True
        owner = self.celery_alchemy_owner
        if owner is not None and owner.opened is self:
            owner.follow_connections()
        return found

    def bind_mapper(self, mapper: Any, bind: Any) -> None:
        self.has_one_bind = False
        super().bind_mapper(mapper, bind)

    def bind_table(self, table: Any, bind: Any) -> None:
        self.has_one_bind = False
        super().bind_table(table, bind)

    def commit(self) -> None:
        self._follow_own_commit()
        finish(self, super().commit)

    def rollback(self) -> None:
        super().rollback()
        owner = owner_of(self)
        if owner is not None:
            owner.rolled_back()

    # Its unit of work closes it, and nobody else: work that was not committed would be lost without a word. All ways of
    # closing it end here (`super().close()` too), those of ending its transaction in `ClosingTransaction.close`.

    def _close_impl(self, invalidate: bool, is_reset: bool = False) -> None:
        owner = self.celery_alchemy_owner
        if owner is None or owner.opened is not self:
            super()._close_impl(invalidate, is_reset)
            return
        self.tell_of_close(None)
        with told(self):
            super()._close_impl(invalidate, is_reset)
        if not is_reset:
            owner.forget_session()

    def tell_of_close(self, transaction: SessionTransaction | None) -> None:
        """Code closes `transaction`, or the Session: where that loses work, nothing more is executed."""
        owner: Any = self.celery_alchemy_owner
        if owner is None or owner.opened is not self:
            return
        self.may_have_written = has_written_in(self, transaction)
        if transaction is None or not transaction.nested or self.may_have_written or has_changes(self):
            owner.closing(self)
        if owner.closed_early is not None:
            become(self, LosingSession)

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:
        if self._transaction is None and (begin or self.autobegin):
            return ClosingTransaction(self, ORIGINS[begin])
        return super()._autobegin_t(begin)

    # What ends a transaction, or hands one out to be ended: the unit of work follows them from then on.

    def _hand_out(self, transaction: SessionTransaction | None = None) -> None:
        if transaction is not None:
            transaction.__class__ = UnitTransaction
        owner = self.celery_alchemy_owner
        if owner is not None and owner.opened is self:
            owner.follow_transactions()

    def _follow_own_commit(self) -> None:
        owner = self.celery_alchemy_owner
        if owner is not None and owner.waiting is not None and not owner.waiting.held_back:
            self._hand_out()  # not its unit of work commits, which knows by itself

    def begin(self, nested: bool = False) -> SessionTransaction:
        transaction = super().begin(nested)
        self._hand_out(transaction)
        if nested and isinstance(transaction, UnitTransaction):
            transaction.written_before, self.may_have_written = self.may_have_written, False
        return transaction

    def get_transaction(self) -> SessionTransaction | None:
        self._hand_out(transaction := super().get_transaction())
        return transaction

    def get_nested_transaction(self) -> SessionTransaction | None:
        self._hand_out(transaction := super().get_nested_transaction())
        return transaction

    def expunge_all(self) -> None:
        new, persistent = objects_of(self)
        if new or persistent:  # SQLAlchemy makes new, empty maps of what is empty
            super().expunge_all()


_TEXTS = (TextClause, TextualSelect)
_SELECT = ("SELECT ", "select ")
_READS = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/|\()*(?:select|values|table|show|explain|pragma|set)\b", re.I | re.S)


def may_write(clause: Any) -> bool:
    """Tell whether a statement may change something."""
    if not isinstance(clause, _TEXTS):
        return not getattr(clause, "is_select", False)
    text: Any = clause if isinstance(clause, TextClause) else clause.element
    words: str = text.text
    return not words.startswith(_SELECT) and _READS.match(words) is None


class ClosingTransaction(SessionTransaction):
    """A transaction that tells its Session when it is closed with its end undecided."""

    written_before = False
    """Of a savepoint: what `may_have_written` of its Session was before it."""

    def close(self, invalidate: bool = False) -> None:
        session: Any = self.session
        state = provisions_of(self)[0]
        if state is ACTIVE and not session.is_told:
            session.tell_of_close(self)
        super().close(invalidate)
        if self.nested:
            session.may_have_written = self.written_before or (state is COMMITTED and session.may_have_written)

    def rollback(self, _capture_exception: bool = False, _to_root: bool = False) -> None:
        with told(self.session):  # SQLAlchemy closes the savepoints in it
            super().rollback(_capture_exception, _to_root)

    def _take_snapshot(self) -> None:
        # SQLAlchemy makes four maps here, for what a ROLLBACK is to undo in objects. Who changes no object needs none.
        if self.nested or not SNAPSHOT_MAPS:
            super()._take_snapshot()

    def _begin(self, nested: bool = False) -> SessionTransaction:
        # That of a flush is of this class too: where there are two, Python looks up anew what it had found for one.
        if nested or provisions_of(self)[0] is not ACTIVE:
            return super()._begin(nested)  # which refuses what is not active
        return ClosingTransaction(self.session, SUBTRANSACTION, self)


for _name in SNAPSHOT_MAPS:
    setattr(ClosingTransaction, _name, SnapshotMap(_name))


class UnitTransaction(ClosingTransaction):
    """What `Session.begin()` returns: its COMMIT ends as the Session's own does."""

    def commit(self, _to_root: bool = False) -> None:
        finish(self.session, functools.partial(super().commit, _to_root))


class LosingSession(UnitSession):
    """A Session that has lost work to a close: nothing more is executed, for it would be committed alone."""

    def get_bind(self, *args: Any, **keywords: Any) -> Engine | Connection:
        owner: Any = self.celery_alchemy_owner
        if owner is not None and owner.opened is self:
            raise error_for(owner.label, owner.closed_early)
        return super().get_bind(*args, **keywords)


def finish(session: Session, commit: Callable[[], None]) -> None:
    """Call `commit`, which commits `session`; the COMMITs of what may have written are counted.

    Raises:
        Exception: what it failed with; not what a listener raises once the server has committed.
    """
    scope: Scope = getattr(current_scope(), SCOPE, None) or here()
    before, transaction = scope.commits, root_of(session)
    entries = len(provisions_of(transaction)[1]) if transaction is not None else 0
    if entries > ONE_CONNECTION:
        owner = owner_of(session)
        if owner is not None:
            owner.refuse_failed(session)  # before the COMMIT of any
    try:
        commit()
    except Exception as error:
        commit_failed(session, transaction, error, before)
    if not getattr(session, "may_have_written", True) and scope.commits > before:
        scope.commits -= entries // ONE_CONNECTION  # its own; callbacks may have sent others meanwhile


def commit_failed(session: Session, transaction: SessionTransaction | None, error: Exception, commits: int) -> None:
    """Raise `error`, with which the COMMIT of `transaction` has failed, or one that says more; return where the server
    had committed, and a listener failed after that.

    Args:
        commits: COMMITs of the thread or greenlet before this one.
    """
    owner = owner_of(session)
    if owner is None:
        raise error
    if here().commits == commits or transaction is None or not is_over(transaction):
        raised = owner.explained(error, transaction)
        if raised is error:
            raise error
        raise raised from raised.__cause__
    owner.listener_failed(error)
    _end_after_all(owner, transaction)


def _end_after_all(owner: Owner, transaction: SessionTransaction) -> None:
    """Do what was left undone when a listener failed after the COMMIT of `transaction`."""
    session = transaction.session
    if root_of(session) is transaction:
        owner.committed = transaction
        with contextlib.suppress(Exception):  # a listener that failed may fail again
            transaction.close()
    if owner.waiting is not None:
        owner.committed = transaction
        _after_end(session, transaction)


_classes: weakref.WeakKeyDictionary[type[Session], dict[object, type[Any]]] = weakref.WeakKeyDictionary()


def class_of(base: type[Session], kinds: tuple[type[Session], ...], has_one_bind: bool) -> type[UnitSession]:
    """Return `base` as one of these kinds; made once, for SQLAlchemy remembers every Session class it has listened
    to."""
    made = _classes.setdefault(base, {})
    key = (kinds, has_one_bind)
    if key not in made:
        bases = kinds if issubclass(kinds[-1], base) else (*kinds, base)
        closes_plainly = all(getattr(base, name) is getattr(Session, name) for name in CLOSING_METHODS)
        made[key] = type(base.__name__, bases, {"has_one_bind": has_one_bind, "closes_plainly": closes_plainly})
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


def owner_of(session: Session) -> Owner | None:
    """Return the unit of work of `session`; None where it has none."""
    return getattr(session, OWNER, None)


def connection_for(session: Session, statement: Any) -> Connection:
    """Return the connection that `session` executes `statement` on, for this package's own use: no other code is given
    it."""
    found = Session.connection(session, bind_arguments={"clause": statement})
    if isinstance(session, UnitSession):
        session.may_have_written = True
    return found


def waiting_of(session: Session) -> CommitCallbacks | None:
    """Return what waits for the COMMIT of `session`; None when nothing ever did."""
    owner = owner_of(session)
    return owner.waiting if owner is not None else None


def watch_commits(session: Session) -> None:
    """Tell the callbacks of the unit of work of `session` when a transaction or savepoint of it ends.

    On this Session alone, and only when a callback waits: on the class, every task would pay 5 us for it.
    """
    if not event.contains(session, "after_commit", _after_commit):
        listen_to(session, "after_transaction_end", _after_end)  # first: a time limit may strike between the two
        listen_to(session, "after_commit", _after_commit)


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
