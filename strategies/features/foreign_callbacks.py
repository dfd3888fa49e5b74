"""What waits for a COMMIT that is not ours, and is told of in a warning where it waits in vain."""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from typing import Any

from sqlalchemy.engine import Connection, Transaction
from sqlalchemy.orm import Session, SessionTransaction

from .._sqlalchemy import held_by, joined_by
from ..core_transactions import follow, open_transactions
from ..on_commit import Callback, CommitCallbacks, End, Entry
from ..place import current_coroutine
from ..scope import here, runs_in_greenlet
from . import on_event_loop

logger: logging.Logger = logging.getLogger(__name__)

_COMMIT_OR_ROLL_BACK = (
    " Call commit() before its end, even where nothing was written; or rollback(), where nothing is to be sent."
)

CLOSES = ("close", "invalidate", "reset")
_CUT_OFF = "did not get to the end of its COMMIT, which the server may have had all the same"


class ForeignCallbacks(CommitCallbacks):
    """What waits for the COMMIT of a Session that is not ours; under an AsyncSession it runs in a thread."""

    __slots__ = (
        "__weakref__",
        "_known_reason",
        "_place",
        "_unasked",
        "is_committing",
        "loses_nothing",
        "request_failed",
    )

    waits_for = "A Session"
    """Named in warnings."""

    def __init__(self) -> None:
        super().__init__(on_event_loop.run_callback)
        self._known_reason = False
        self._unasked: list[Callback] = []
        self.is_committing: bool = False
        """Its COMMIT has begun."""
        self.loses_nothing: bool = False
        """The Session is being closed, and nothing was written in its transaction."""
        self.request_failed: bool = False
        """The web request that it is of is answered with an error, which is worth no warning more."""
        _all.add(self)

    def add(self, callback: Callback, savepoint: SessionTransaction | None, **how: Any) -> None:
        """Let `callback` wait, and remember which thread, greenlet or asyncio task commits."""
        self._place = weakref.ref(current_coroutine() or here())
        super().add(callback, savepoint, **how)

    def is_of_here(self) -> bool:
        """Tell whether what waits was registered in this thread, greenlet or asyncio task."""
        return bool(self._waiting) and self._place() is (current_coroutine() or here())

    def __del__(self) -> None:
        self.warn_if_any("was thrown away without a COMMIT")

    def warn_if_any(self, what: str, remedy: str = _COMMIT_OR_ROLL_BACK) -> None:
        """Say what waits in vain for a Session, or a Connection, that `what`."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            logger.warning(
                "%s %s, and what waited for its COMMIT is dropped: %s.%s",
                self.waits_for, what, ", ".join(repr(callback) for callback, *_ in waiting), remedy,
            )  # fmt: skip

    def expect_rollback(self) -> None:
        """Its owner knows why the transaction that is open ends without a COMMIT: that is worth no warning."""
        self._known_reason = True

    def keep_if_nothing_is_lost(self, callback: Callback) -> None:
        """Run `callback`, which waits, also at the end of a transaction that is closed and had nothing to commit: its
        caller has not asked for a COMMIT."""
        self._unasked.append(callback)

    def ended(self, transaction: SessionTransaction, *, committed: bool) -> None:
        """`transaction` (root or savepoint) is over; say what has waited in vain where nothing else tells of it."""
        if transaction.nested:
            super().ended(transaction, committed=committed)
            return
        restore_methods(transaction.session)
        committed = self._goes_on(transaction, committed=committed) or committed
        error = sys.exc_info()[1]
        known, self._known_reason = self._known_reason or isinstance(error, Exception), False
        began_commit, self.is_committing = self.is_committing, False
        if not committed and not known and began_commit:
            self.warn_if_any(_CUT_OFF, remedy="")
        known = known or error is not None
        unasked, self._unasked = self._unasked, []
        if not committed and not known:
            if self.loses_nothing:
                self._ready.extend((one, raises) for one, raises, *_ in self._waiting if one in unasked)
                self._waiting = [entry for entry in self._waiting if entry[0] not in unasked]
            if not self.request_failed:
                self.warn_if_any("was closed without a COMMIT")
        self.request_failed = False
        super().ended(transaction, committed=committed)
        if not committed:
            self.run_ready()

    def committed(self, transaction: SessionTransaction | None, callback: Callback, *, raises: bool) -> None:
        """Run `callback`, which was registered while the COMMIT of `transaction` is being reported."""
        self.add(callback, None, raises=raises)
        if transaction is None or not self._goes_on(transaction, committed=True):
            self.run_all()

    def _goes_on(self, transaction: SessionTransaction, *, committed: bool) -> bool:
        """Tell whether what was executed in `transaction` is part of a transaction that other code has begun on the
        Session's Connection; what waits, waits for the COMMIT of that then."""
        if not self._waiting:
            return False
        if committed:
            bind = transaction.session.bind
            connections = {*held_by(transaction), *([bind] if isinstance(bind, Connection) else [])}
        else:
            connections = {*joined_by(transaction)}
        outer = open_transactions(connections)
        if outer:
            waiting, self._waiting = self._waiting, []
            OuterCallbacks(waiting, self._place, outer)
        return bool(outer)

    def ended_outside(self, end: End) -> None:
        """Code has ended the transaction by the methods of the Connection; say what has waited in vain."""
        if end is End.UNKNOWN:
            self.warn_if_any(_CUT_OFF, remedy="")
        elif end is End.CLOSED and not self._known_reason and not isinstance(sys.exc_info()[1], Exception):
            self.warn_if_any("was closed without a COMMIT")
        super().ended_outside(end)

    def run_ready(self) -> None:
        """Run, in order, what a COMMIT has set free; on an event loop in a thread, for the loop is to go on."""
        if not self._ready or self.held_back or not runs_in_greenlet():
            super().run_ready()
            return
        batch, self._ready = self._ready, []
        on_event_loop.run_callbacks(batch)


def restore_methods(session: Session) -> None:
    """Let `session` have its own methods again, which stand-ins were put before while something waited."""
    for name in ("begin", *CLOSES):
        vars(session).pop(name, None)


class OuterCallbacks(ForeignCallbacks):
    """What waited for a Session that has ended its part of a transaction of other code, begun on its Connection.

    Args:
        outer: The transactions that must be committed, and the savepoints that are open in them.
    """

    __slots__ = ("_open",)

    waits_for = "A Connection"

    def __init__(self, waiting: list[Entry], place: Any, outer: list[tuple[Transaction, list[Transaction]]]) -> None:
        super().__init__()
        self._waiting, self._place = waiting, place
        self._open = len(outer)
        for root, savepoints in outer:
            follow(root, self, lambda: self._root_ended)
            for savepoint in savepoints:
                follow(savepoint, self, lambda: self._savepoint_ended)

    def _root_ended(self, end: End) -> None:
        self._open -= 1
        if end is not End.COMMITTED:
            self.ended_outside(end)
        elif not self._open:
            self.run_all()

    def _savepoint_ended(self, end: End) -> None:
        if end is not End.COMMITTED:
            self._waiting.clear()


_all: weakref.WeakSet[ForeignCallbacks] = weakref.WeakSet()


def waiting_here() -> list[ForeignCallbacks]:
    """Return what waits for COMMITs of this thread, greenlet or asyncio task."""
    return [waiting for waiting in list(_all) if waiting.is_of_here()]


@atexit.register
def _warn_at_exit() -> None:
    for waiting in list(_all):
        waiting.warn_if_any("was not committed before the process ended")
