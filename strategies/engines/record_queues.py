"""The queues of connection pools: records that are idle."""

from __future__ import annotations

import threading
import time
from collections import deque

from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util.queue import Empty, Full


class RecordQueue:
    """Records of a connection pool that are idle. A checkout that waits for nobody takes no lock.

    The lock of the others may be taken again by its holder: the garbage collector may put a record back at any time.

    Args:
        maxsize: The most records it keeps; 0: no limit.
        use_lifo: The record that came last goes first.
    """

    __slots__ = ("_available", "_waiting", "maxsize", "mutex", "queue", "use_lifo")

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        self.maxsize: int = maxsize
        self.use_lifo: bool = use_lifo
        self.queue: deque[ConnectionPoolEntry] = deque()
        self.mutex: threading.RLock = threading.RLock()
        self._available = threading.Condition(self.mutex)
        self._waiting = 0

    def qsize(self) -> int:
        """Return how many records there are."""
        return len(self.queue)

    def put(self, record: ConnectionPoolEntry, block: bool = True) -> None:
        """Add `record`.

        Raises:
            Full: there are `maxsize` already, whether it may `block` or not.
        """
        with self.mutex:
            if len(self.queue) >= self.maxsize > 0:
                raise Full
            self.queue.append(record)
            if self._waiting:
                self._available.notify()

    def take(self) -> ConnectionPoolEntry | None:
        """Take a record; None, at once, where there is none. One step of a deque, which needs no lock."""
        try:
            return self.queue.pop() if self.use_lifo else self.queue.popleft()
        except IndexError:
            return None

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:
        """Take a record.

        Args:
            block: Wait for one, `timeout` seconds at most; None: for ever.
        Raises:
            Empty: there is none.
        """
        with self.mutex:
            if not self.queue:
                if not block:
                    raise Empty
                self._wait(timeout)
            return self.queue.pop() if self.use_lifo else self.queue.popleft()

    def _wait(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        self._waiting += 1
        try:
            while not self.queue:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise Empty
                self._available.wait(left)
        except BaseException:
            if self.queue:
                self._available.notify()  # killed after it was called: the next in line is called instead
            raise
        finally:
            self._waiting -= 1


class RetiredRecordQueue(RecordQueue):
    """The queue of a connection pool that is disposed: what comes back is closed, unless a thread waits for it."""

    __slots__ = ()

    def put(self, record: ConnectionPoolEntry, block: bool = True) -> None:
        """Add `record` where a thread waits.

        Raises:
            Full: none does.
        """
        with self.mutex:
            if not self._waiting:
                raise Full
            super().put(record, block)


#: The class of a queue, and what it is when its connection pool is disposed: one in use has nothing to ask for.
_RETIRED: dict[type, type] = {RecordQueue: RetiredRecordQueue}


def retires(kind: type, retired: type) -> None:
    """Let queues of `kind` be `retired` when their connection pool is disposed."""
    _RETIRED[kind] = retired


def retire_queue(queue: object) -> None:
    """Let `queue`, of a connection pool that is disposed, keep nothing that comes back."""
    retired = _RETIRED.get(type(queue))
    if retired is not None:
        queue.__class__ = retired
