"""What runs after a commit: a list that follows the transaction and its savepoints."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sqlalchemy.orm import SessionTransaction

from .interrupts import is_interrupt, shield

logger = logging.getLogger(__name__)

Callback = Callable[[], object]
Runner = Callable[[Callback], None]


class CommitCallbacks:
    """The callables that one unit of work runs after its COMMIT, each beside the savepoint it was registered in.

    SQLAlchemy's `after_commit` event also fires for savepoints, and with the connection still held; so the list follows
    `after_transaction_end`. What a savepoint's rollback undoes is dropped; what it releases, its parent takes over.
    """

    __slots__ = ("_ready", "_run", "_waiting", "held_back")

    def __init__(self, run: Runner) -> None:
        self._run = run
        self._waiting: list[tuple[Callback, SessionTransaction | None]] = []
        self._ready: list[Callback] = []
        self.held_back = 0
        """Above 0, what a COMMIT sets free waits for `run_ready`: until the shield is left, the Session is gone."""

    def add(self, callback: Callback, savepoint: SessionTransaction | None) -> None:
        self._waiting.append((callback, savepoint))

    def drop(self) -> int:
        """Forget all that wait; return how many there were."""
        count = len(self._waiting)
        self._waiting.clear()
        return count

    def ended(self, transaction: SessionTransaction, *, committed: bool) -> None:
        """`transaction` (root or savepoint) is over, committed or not."""
        if transaction.nested:
            parent = transaction.parent
            heir = parent if parent is not None and parent.nested else None
            self._waiting = [
                (callback, heir if savepoint is transaction else savepoint)
                for callback, savepoint in self._waiting
                if committed or savepoint is not transaction
            ]
        elif not committed:
            self._waiting.clear()
        else:
            self._release()

    def run_now(self, callback: Callback) -> None:
        """Run `callback` as one whose COMMIT has just succeeded."""
        self._ready.append(callback)
        self.run_ready()

    @shield.covers
    def run_all(self) -> None:
        """Run what waits: the unit of work ended well, and there was no transaction to wait for."""
        self._release()

    @shield.covers
    def _release(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._ready.extend(callback for callback, _ in waiting)
        self.run_ready()

    @shield.covers
    def run_ready(self) -> None:
        """Run, in order, what a COMMIT has set free. The error of one is logged and stops no other; a time limit is
        raised once all have run."""
        interrupt: BaseException | None = None
        while self._ready and not self.held_back:
            callback = self._ready.pop(0)
            try:
                self._run(callback)
            except Exception as error:
                logger.exception("on_commit callback %r failed; the transaction it waited for is committed", callback)
                if is_interrupt(error):
                    interrupt = error
        if interrupt is not None:
            raise interrupt
