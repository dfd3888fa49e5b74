"""What runs after a commit: a stack of lists that follows the transaction and its savepoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy.orm import SessionTransaction

logger = logging.getLogger(__name__)

Callback = Callable[[], object]
Runner = Callable[[Callback], None]


class CommitCallbacks:
    """The callables that one unit of work runs after its COMMIT.

    SQLAlchemy's `after_commit` event also fires for savepoints, and with the connection still held; so the lists follow
    `after_transaction_end`. What a savepoint's rollback undoes, its list forgets; what it releases, its parent takes.
    """

    __slots__ = ("_committed", "_held_back", "_levels", "_ready", "_root", "_run")

    def __init__(self, run: Runner) -> None:
        self._run = run
        self._root: list[Callback] = []
        self._levels: list[tuple[SessionTransaction, list[Callback]]] = []
        self._committed: SessionTransaction | None = None
        self._ready: list[Callback] = []
        self._held_back = False

    def __len__(self) -> int:
        return len(self._root) + sum(len(level) for _, level in self._levels)

    def add(self, callback: Callback) -> None:
        (self._levels[-1][1] if self._levels else self._root).append(callback)

    def drop(self) -> int:
        """Forget all that wait; return how many there were."""
        count = len(self)
        self._root.clear()
        for _, level in self._levels:
            level.clear()
        return count

    def savepoint(self, transaction: SessionTransaction) -> None:
        self._levels.append((transaction, []))

    def savepoint_ended(self, transaction: SessionTransaction) -> None:
        released = self._committed is transaction
        if released:
            self._committed = None
        while self._levels:
            found, level = self._levels.pop()
            if found is transaction:
                if released:
                    (self._levels[-1][1] if self._levels else self._root).extend(level)
                return

    def committed(self, transaction: SessionTransaction | None) -> None:
        self._committed = transaction

    def ended(self, transaction: SessionTransaction) -> None:
        committed, self._committed = self._committed is transaction, None
        self._levels.clear()
        waiting, self._root = self._root, []
        if not committed:
            return
        self._ready.extend(waiting)
        self.run_ready()

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Let the callbacks of a commit inside the block wait for `run_ready`: outside the shield, unhurried."""
        before, self._held_back = self._held_back, True
        try:
            yield
        finally:
            self._held_back = before

    def run_all(self) -> None:
        """Run what waits: the unit of work ended well, and there was no transaction to wait for."""
        waiting, self._root = self._root, []
        self._ready.extend(waiting)
        self.run_ready()

    def run_ready(self) -> None:
        """Run, in order, what a COMMIT has set free. The error of one is logged and stops no other."""
        while self._ready and not self._held_back:
            callback = self._ready.pop(0)
            try:
                self._run(callback)
            except Exception:
                logger.exception("on_commit callback %r failed; the transaction it waited for is committed", callback)
