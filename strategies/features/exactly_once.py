"""A task's effects exactly once: a row that says that it has completed, in the transaction of its work.

"first" inserts the row when the transaction begins, together with the task's first statement: another copy that runs
at the same time finds out before it has done anything. "last" inserts it right before the COMMIT: the copy that comes
second is rolled back there. Both write it whichever way the transaction is committed.

Who runs the task gives each of its runs an `Attempt`; here it is followed through the Session's events.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, Literal

from sqlalchemy import Executable, Table, event, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, SessionTransaction

from .._sqlalchemy import commits_itself, connections_of, has_changes, is_autocommit, is_two_phase, root_of
from ..drivers.along import Along
from ..drivers.base import driver_of
from ..errors import CeleryAlchemyError, InvalidSetting
from ..hooks import OpenUnit, UnitHook
from ..sessions import become, connection_for
from . import completed
from .completed import Claim, Key, Record
from .outbox_insert import made_once

Mode = Literal["first", "last"]
FIRST: Literal["first"] = "first"
LAST: Literal["last"] = "last"
ATTEMPT = "_celery_alchemy_attempt"
"""In the `__dict__` of a request: its Attempt."""
#: The note of a row that was committed before its task has ended: what it returns is not known yet.
UNFINISHED = json.dumps({"unfinished": True})
_listening = threading.Lock()


class Superseded(BaseException):
    """Ends a run of a body that another one has overtaken, or may have; the task does not fail with it.

    No Exception: the task's own `except Exception` is not for it.
    """

    def __init__(self, claim: Claim) -> None:
        super().__init__(claim)
        self.claim = claim


class CommittedEarly(CeleryAlchemyError):
    """A task with `exactly_once` has committed before its end, and wants to do what cannot be done once more then."""


class Attempt:
    """One run of the body of a task, and what has become of its row.

    Args:
        task: The task's name.
        label: Of its unit of work, for messages.
        needs_result: Why it must not commit before its end, for a message; None: it may.
        write: Lets the row say a record in a transaction of its own, where the Attempt has committed.
    """

    __slots__ = (
        *("_along", "_ending", "committed", "committing", "key", "label", "lost", "mode", "needs_result", "over"),
        *("record", "refused", "table", "task", "write", "written"),
    )

    def __init__(
        self, key: Key, task: str, table: Table, mode: Mode, label: str, needs_result: str | None,
        write: Callable[[Attempt, Record], None],
    ) -> None:  # fmt: skip
        self.key: Key = key
        self.task: str = task
        self.table: Table = table
        self.mode: Mode = mode
        self.label: str = label
        self.needs_result: str | None = needs_result
        self.write: Callable[[Attempt, Record], None] = write
        self.over: bool = False
        """It has turned out that the body need not run: there is nothing to write."""
        self.again()

    def again(self) -> None:
        """The body runs, for the first time or once more."""
        self.record: Record | None = None
        """What its row is to say; None: the body has not returned."""
        self.written: Record | bool = False
        """What the row says in the transaction that is open; True: no more than that the task has begun."""
        self.committing: bool = False
        """The Session sends the COMMIT of the transaction that is open. Where it fails, nobody may know what the server
        has done."""
        self.committed: bool = False
        """A transaction with the row in it is committed."""
        self.lost: Claim | None = None
        """Another run has the row."""
        self.refused: InvalidSetting | None = None
        """Why its transaction cannot be committed, whatever the task's code has made of that."""
        self._along: Along | None = None
        """What inserts the row together with the first statement."""
        self._ending: Along | None = None
        """What writes the row together with the COMMIT."""

    def begun(self, connection: Connection) -> None:
        """A transaction of the task has begun on `connection`."""
        self.written = self.committing = False
        self.go_on()
        self._refuse_autocommit(connection)
        if self.mode == FIRST and not self.committed and not self._begin_with(connection):
            self._insert(connection, None, waits=False)

    def ended(self) -> None:
        """The transaction is over, one way or the other."""
        self._along = self._ending = None

    def _begin_with(self, connection: Connection) -> bool:
        """Let the row be inserted together with the first statement, where the connection can do that."""
        raw = connection.connection.dbapi_connection
        if not hasattr(raw, "celery_alchemy_begin_with"):
            return False
        text, values = completed.written(connection, self.table, self.key, self.task, None)
        along = Along(text, values, lambda one: one is self._along, self._refused)
        if not driver_of(connection.dialect).begin_with(raw, along):
            return False
        self._along, self.written = along, True
        return True

    def _commit_with(self, connection: Connection, record: Record) -> bool:
        """Let the row be written together with the COMMIT, where the connection can do that."""
        if not self.committing:
            return False
        if self.written:
            text, values = completed.completing(connection, self.table, self.key, record)
        else:
            text, values = completed.inserted(connection, self.table, self.key, self.task, record)
        along = Along(text, values, lambda one: one is self._ending, self._refused_at_end)
        raw = connection.connection.dbapi_connection
        if not driver_of(connection.dialect).commit_with(connection.dialect, raw, along):
            return False
        self._ending = along
        return True

    def _refused(self, error: BaseException) -> None:
        self.lost = completed.claim_along(error, self.table) or self.lost

    def _refused_at_end(self, error: BaseException) -> None:
        self.lost = completed.claim_along(error, self.table, at_end=True) or self.lost

    def commits(self, connection: Connection, *, along: bool = False) -> None:
        """The transaction of `connection` is about to be committed: let the row say what it is to say.

        Args:
            along: Together with the COMMIT, where that saves a round trip.
        """
        self.go_on()
        if self._along is not None and not self._along.sent:
            self._along, self.written = None, False  # nothing was executed that could have taken it along
        if self.record is None and self.needs_result is not None:
            raise CommittedEarly(
                f"{self.label} has exactly_once, and commits before its end, but {self.needs_result}. Were its worker "
                f"killed after this COMMIT, its work would be done and its result lost, and what comes next could not "
                f"be. Leave self.db.commit() out, which the end of the task does: the result is committed with the "
                f"work. Or let nothing take the result: ignore_result=True, and signatures made with .si()."
            )
        record = self.record or Record(note=UNFINISHED)
        if self.written is True and record == Record():
            self.written = record  # an empty row says so
        if self.written == record:
            return
        if along and not self.committed and self._commit_with(connection, record):
            self.written = record
            return
        if self.written is False and not (
            self.committed and completed.complete(connection, self.table, self.key, record)
        ):
            self._insert(connection, record, waits=True)
        elif self.written is True:
            completed.complete(connection, self.table, self.key, record)
        self.written = record

    def commits_outside(self, connection: Connection) -> None:
        """Code commits `connection` past its Session."""
        if not self.committing:
            self.commits(connection)
            self.committed = True

    def go_on(self) -> None:
        """Raise where another run has the row, or the row cannot be of use, whatever the task's code has made of that.

        Raises:
            Superseded: another run has it.
            InvalidSetting: each statement commits itself.
        """
        if self.lost is not None:
            raise Superseded(self.lost)
        if self.refused is not None:
            raise self.refused

    def _refuse_autocommit(self, connection: Connection) -> None:
        """Refuse a connection on which each statement commits itself: the row would be committed alone, and a body that
        fails after that taken for one that has completed.

        Raises:
            InvalidSetting: it is one.
        """
        if is_autocommit(connection):
            self.refused = InvalidSetting(
                f"{self.label} has exactly_once, and its connection is in AUTOCOMMIT: its work, and the row that says "
                f"that it is done, would be committed one by one. Leave isolation_level='AUTOCOMMIT' (or the driver's "
                f"autocommit) out, or let the task have exactly_once=False."
            )
            raise self.refused

    def _insert(self, connection: Connection, record: Record | None, *, waits: bool) -> None:
        try:
            completed.write(connection, self.table, self.key, self.task, record, waits=waits)
        except DBAPIError as error:
            self.lost = completed.claim_of(error, connection)
            if self.lost is None:
                raise
            raise Superseded(self.lost) from error
        self.written = record if record is not None else True


class OnceSession(Session):
    """Session of a task with `exactly_once`. A class, for what listens to one Session costs each task 30 us."""

    celery_alchemy_attempt: Attempt | None = None

    def connection(self, *args: Any, **keywords: Any) -> Connection:
        """Return the connection, whose own `commit()` is followed from then on."""
        found = super().connection(*args, **keywords)
        attempt = self.celery_alchemy_attempt
        if attempt is not None and not event.contains(found, "commit", attempt.commits_outside):
            event.listen(found, "commit", attempt.commits_outside)
        return found


def _after_begin(session: OnceSession, transaction: SessionTransaction, connection: Connection) -> None:
    attempt = session.celery_alchemy_attempt
    if attempt is None or attempt.over or transaction.parent is not None:
        return
    if _is_its_own(session, connection, attempt):
        attempt.begun(connection)


def _is_its_own(session: Session, connection: Connection, attempt: Attempt) -> bool:
    """Tell whether the row goes onto `connection`; a Session may be bound to several databases."""
    if getattr(session, "has_one_bind", False):
        return True
    return bool(session.get_bind(clause=_row(attempt.table)).engine is connection.engine)


def _row(table: Table) -> Any:
    """Return a statement on `table`, by which its connection is found."""
    return made_once(table, _select)


def _select(table: Table, _: bool) -> Executable:
    return select(table)


def _before_commit(session: OnceSession) -> None:
    attempt = session.celery_alchemy_attempt
    if attempt is None or attempt.over or session.in_nested_transaction():
        return
    attempt.go_on()
    if attempt.committed:
        _refuse_more(session, attempt)
    if not connections_of(session) and not has_changes(session):
        return  # nothing is committed
    connection = connection_for(session, _row(attempt.table))
    attempt.committing = True
    attempt.commits(connection, along=not is_two_phase(connection) and commits_itself(session, connection))


def _after_end(session: OnceSession, transaction: SessionTransaction) -> None:
    attempt = session.celery_alchemy_attempt
    if attempt is not None and transaction.parent is None:
        attempt.ended()


def _after_commit(session: OnceSession) -> None:
    attempt = session.celery_alchemy_attempt
    if attempt is not None and not session.in_nested_transaction() and attempt.committing:
        attempt.committed = True


def _refuse_more(session: Any, attempt: Attempt) -> None:
    """Refuse a second COMMIT that writes: the first has recorded the task, and would not be done again with this one.

    Raises:
        CommittedEarly: it does.
    """
    writes = has_changes(session)
    if not writes and getattr(session, "may_have_written", True):
        writes = any(driver_of(one.dialect).has_written(one) is not False for one in connections_of(session))
    if writes:
        raise CommittedEarly(
            f"{attempt.label} has exactly_once, and commits work for a second time. The COMMIT before this one has "
            f"recorded the task: were its worker killed now, what comes after that would never be done. Leave "
            f"self.db.commit() out, which the end of the task does; or give each part a task of its own."
        )


class ExactlyOnce(UnitHook):
    """Lets the units of work of a task write its row. Made once for each task."""

    __slots__ = ()

    def __init__(self) -> None:
        with _listening:  # a task in another thread that went on with half of them would not write its row
            if not event.contains(OnceSession, "after_transaction_end", _after_end):
                event.listen(OnceSession, "after_begin", _after_begin)
                event.listen(OnceSession, "before_commit", _before_commit)
                event.listen(OnceSession, "after_commit", _after_commit)
                event.listen(OnceSession, "after_transaction_end", _after_end)

    def opened(self, unit: OpenUnit, session: Session) -> None:
        """Follow `session` where it is that of a run."""
        attempt = attempt_of(unit)
        if attempt is not None:
            become(session, OnceSession)
            session.celery_alchemy_attempt = attempt  # type: ignore[attr-defined]

    def before_others(self, unit: OpenUnit) -> None:
        """Write the row before other databases commit: a copy that has it first is to find out by then."""
        self.before_commit(unit)
        attempt = attempt_of(unit)
        if attempt is None or not unit.commits:
            return
        if attempt.committed:
            _refuse_more(unit.session, attempt)
        else:
            attempt.commits(connection_for(unit.session, _row(attempt.table)))

    def before_commit(self, unit: OpenUnit) -> None:
        """Let there be a transaction to write the row into."""
        attempt = attempt_of(unit)
        if attempt is None or not unit.commits:
            return
        attempt.go_on()
        if attempt.committed and (unit.opened is None or not unit.opened.in_transaction()):
            return
        session = unit.session
        if root_of(session) is None:
            session.begin()
        if not connections_of(session):
            connection_for(session, _row(attempt.table))


def attempt_of(unit: Any) -> Attempt | None:
    """Return the Attempt that `unit` is; None where it is the unit of work of something else, or on another
    database."""
    if unit.kind not in {"run", "call"} or unit.database != "default" or unit.request is None:
        return None
    found: Attempt | None = unit.request.__dict__.get(ATTEMPT)
    return found if found is not None and not found.over else None


def probe(engine: Any, table: Table, key: Key, task: str) -> Claim | None:
    """Tell whether another transaction has the row of `key` in hand; None: none has. Leaves nothing behind."""
    with engine.connect() as connection:
        try:
            completed.write(connection, table, key, task, None, waits=False)
        except DBAPIError as error:
            claim = completed.claim_of(error, connection)
            if claim is None:
                raise
            return claim
        finally:
            connection.rollback()
    return None
