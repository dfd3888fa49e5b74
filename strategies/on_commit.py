"""What runs after a commit: a list that follows the transaction and its savepoints."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.orm import SessionTransaction

from .interrupts import is_interrupt, shield

logger = logging.getLogger(__name__)

Callback = Callable[[], object]
Kind = TypeVar("Kind")
Runner = Callable[[Callback], None]


def heir_of(savepoint: SessionTransaction) -> SessionTransaction | None:
    """Return the savepoint that takes over what waits in `savepoint` when that is released; None: the root does."""
    parent = savepoint.parent
    return parent if parent is not None and parent.nested else None


class CommitCallbacks:
    """The callables that one unit of work runs after its COMMIT, each beside the savepoint it was registered in.

    SQLAlchemy's `after_commit` event also fires for savepoints, and with the connection still held; so the list follows
    `after_transaction_end`. What a savepoint's rollback undoes is dropped; what it releases, its parent takes over.
    """

    __slots__ = ("_ready", "_run", "_waiting", "held_back")

    def __init__(self, run: Runner) -> None:
        self._run = run
        self._waiting: list[tuple[Callback, bool, SessionTransaction | None]] = []
        self._ready: list[tuple[Callback, bool]] = []
        self.held_back = 0
        """Above 0, what a COMMIT sets free waits for `run_ready`: until the shield is left, the Session is gone."""

    def add(self, callback: Callback, savepoint: SessionTransaction | None, *, raises: bool = False) -> None:
        """Let `callback` wait, for the root transaction or for `savepoint`.

        Args:
            raises: Its error is raised to whoever commits, once all have run; otherwise it is logged only.
        """
        self._waiting.append((callback, raises, savepoint))

    def take(self, kind: type[Kind]) -> list[Kind]:
        """Return, in order, those that wait and are of this kind, and let them wait no longer."""
        taken = [callback for callback, _, _ in self._waiting if isinstance(callback, kind)]
        self._waiting = [entry for entry in self._waiting if not isinstance(entry[0], kind)]
        return taken

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
                (callback, raises, heir if savepoint is transaction else savepoint)
                for callback, raises, savepoint in self._waiting
                if committed or savepoint is not transaction
            ]
        elif not committed:
            self._waiting.clear()
        else:
            self._release()

    def run_now(self, callback: Callback, *, raises: bool = False) -> None:
        """Run `callback` as one whose COMMIT has just succeeded."""
        self._ready.append((callback, raises))
        self.run_ready()

    @shield.covers
    def run_all(self) -> None:
        """Run what waits: the unit of work ended well, and there was no transaction to wait for."""
        self._release()

    @shield.covers
    def _release(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._ready.extend((callback, raises) for callback, raises, _ in waiting)
        self.run_ready()

    @shield.covers
    def run_ready(self) -> None:
        """Run, in order, what a COMMIT has set free. The error of one is logged and stops no other; once all have run,
        a time limit is raised, or else the first error of those that were to raise."""
        interrupt: BaseException | None = None
        wanted: Exception | None = None
        while self._ready and not self.held_back:
            callback, raises = self._ready.pop(0)
            try:
                self._run(callback)
            except Exception as error:
                logger.exception("on_commit callback %r failed; the transaction it waited for is committed", callback)
                if is_interrupt(error):
                    interrupt = error
                elif raises:
                    wanted = wanted or error
        if interrupt is not None or wanted is not None:
            raise interrupt or wanted  # type: ignore[misc]
