"""What runs after a commit: a list that follows the transaction and its savepoints."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, TypeVar

from sqlalchemy.orm import Session, SessionTransaction

from .interrupts import is_interrupt, is_kill, shield

logger: logging.Logger = logging.getLogger(__name__)

Callback = Callable[[], object]
Kind = TypeVar("Kind")
Runner = Callable[[Callback], None]
#: What waits, whether its error is raised, the savepoint of the Session it was registered in, and what stands for those
#: of a Connection.
Entry = tuple[Callback, bool, SessionTransaction | None, tuple[object, ...]]


class End(Enum):
    """How a transaction or savepoint of a Connection has ended."""

    COMMITTED = auto()
    """Or released."""
    ROLLED_BACK = auto()
    CLOSED = auto()
    """Rolled back, and nobody has asked for that."""
    UNKNOWN = auto()
    """Its COMMIT was cut off: the server may have had it."""


def heir_of(savepoint: SessionTransaction) -> SessionTransaction | None:
    """Return the savepoint that takes over what waits in `savepoint` when that is released; None: the root does."""
    parent = savepoint.parent
    return parent if parent is not None and parent.nested else None


def hands_out_transactions(session: Session) -> bool:
    """Tell whether something listens to `session` that is given its transactions, and so can end them."""
    dispatch: Any = session.dispatch
    begin, create = dispatch.after_begin, dispatch.after_transaction_create
    # On this Session, and on its class: `bool(begin)` looks at the same, by two calls in Python.
    return bool(begin.listeners or begin.parent_listeners or create.listeners or create.parent_listeners)


class CommitCallbacks:
    """The callables that one unit of work runs after its COMMIT, each beside the savepoint it was registered in.

    SQLAlchemy's `after_commit` event also fires for savepoints, and with the connection still held; so the list follows
    `after_transaction_end`. What a savepoint's rollback undoes is dropped; what it releases, its parent takes over.
    """

    __slots__ = ("_ready", "_run", "_waiting", "held_back")

    def __init__(self, run: Runner) -> None:
        self._run = run
        self._waiting: list[Entry] = []
        self._ready: list[tuple[Callback, bool]] = []
        self.held_back: int = 0
        """Above 0, what a COMMIT sets free waits for `run_ready`: until the shield is left, the Session is gone."""

    def add(
        self,
        callback: Callback,
        savepoint: SessionTransaction | None,
        *,
        raises: bool = False,
        within: tuple[object, ...] = (),
    ) -> None:
        """Let `callback` wait, for the root transaction or for `savepoint`.

        Args:
            raises: Its error is raised to whoever commits, once all have run; otherwise it is logged only.
            within: What stands for the savepoints of a Connection that are open: see `drop_in`.
        """
        self._waiting.append((callback, raises, savepoint, within))

    def take(self, kind: type[Kind]) -> list[Kind]:
        """Return, in order, those that wait and are of this kind, and let them wait no longer."""
        taken = [callback for callback, _, _, _ in self._waiting if isinstance(callback, kind)]
        self._waiting = [entry for entry in self._waiting if not isinstance(entry[0], kind)]
        return taken

    def of(self, kind: type[Kind]) -> list[Kind]:
        """Return, in order, those that wait and are of this kind."""
        return [callback for callback, _, _, _ in self._waiting if isinstance(callback, kind)]

    def exchange(self, kind: type[Kind], parts: Callable[[Kind], Sequence[Callback]]) -> None:
        """Put what `parts` makes of it in the place of each that waits and is of this kind.

        What `parts` registers itself waits behind the others.
        """
        for entry in list(self._waiting):
            callback, *how = entry
            if isinstance(callback, kind):
                made: list[Any] = [(part, *how) for part in parts(callback)]
                if entry in self._waiting:
                    place = self._waiting.index(entry)
                    self._waiting[place : place + 1] = made

    def has(self, kind: type) -> bool:
        """Tell whether one of this kind waits."""
        return any(isinstance(callback, kind) for callback, _, _, _ in self._waiting)

    def all_of_them(self) -> list[Callback]:
        """Return those that wait, and those that a COMMIT has set free and that have not run yet."""
        return [*(callback for callback, _, _, _ in self._waiting), *(callback for callback, _ in self._ready)]

    def drop(self) -> int:
        """Forget all that wait; return how many there were."""
        count = len(self._waiting)
        self._waiting.clear()
        return count

    def ended(self, transaction: SessionTransaction, *, committed: bool) -> None:
        """`transaction` (root or savepoint) is over, committed or not."""
        if transaction.nested:
            heir = heir_of(transaction)
            self._waiting = [
                (callback, raises, heir if savepoint is transaction else savepoint, within)
                for callback, raises, savepoint, within in self._waiting
                if committed or savepoint is not transaction
            ]
        elif not committed:
            self._waiting.clear()
        else:
            self.run_all()

    def drop_in(self, savepoint: object) -> None:
        """Forget what was registered in a savepoint of a Connection, which is undone."""
        self._waiting = [entry for entry in self._waiting if savepoint not in entry[3]]

    def ended_outside(self, end: End) -> None:
        """Code has ended the transaction by the methods of the Connection; no event of the Session tells of that."""
        if end is End.COMMITTED:
            self.run_all()
        else:
            self._waiting.clear()

    def run_now(self, callback: Callback, *, raises: bool = False) -> None:
        """Run `callback` as one whose COMMIT has just succeeded."""
        self._ready.append((callback, raises))
        self.run_ready()

    @shield.covers
    def run_all(self) -> None:
        """Run what waits: the unit of work ended well, and there was no transaction to wait for."""
        if self._waiting:
            self.set_free()
        self.run_ready()

    @shield.covers
    def set_free(self) -> None:
        """Let what waits be run by `run_ready`."""
        waiting, self._waiting = self._waiting, []
        for callback, raises, _, _ in waiting:
            self._ready.append((callback, raises))

    @shield.covers
    def run_ready(self) -> None:
        """Run, in order, what a COMMIT has set free. The error of one is logged and stops no other; once all have run,
        what came from outside (a time limit, SystemExit) is raised, or else the first error of those that were to
        raise. Only the kill of a greenlet is raised at once, and what has not run is named in the log."""
        interrupt: BaseException | None = None
        wanted: Exception | None = None
        while self._ready and not self.held_back:
            callback, raises = self._ready.pop(0)
            try:
                self._run(callback)
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError) and not isinstance(error, Exception):
                    raise  # who waits for it on an event loop; it goes on there, and so does the rest
                logger.exception("on_commit callback %r failed; the transaction it waited for is committed", callback)
                if is_kill(error):
                    lost, self._ready = [callback for callback, _ in self._ready], []
                    if lost:
                        logger.error("the greenlet was killed; %d more on_commit callbacks do not run: %r",
                            len(lost), lost)  # fmt: skip
                    raise
                if not isinstance(error, Exception) or is_interrupt(error):
                    interrupt = error
                elif raises:
                    wanted = wanted or error
        if interrupt is not None or wanted is not None:
            raise interrupt or wanted  # type: ignore[misc]
