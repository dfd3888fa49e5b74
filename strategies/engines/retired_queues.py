"""The queues of connection pools that are disposed: what comes back is closed, unless somebody waits for it."""

from __future__ import annotations

from sqlalchemy.pool import ConnectionPoolEntry, QueuePool
from sqlalchemy.util.queue import Full

from .._sqlalchemy_pools import queue_of
from .held import RecordQueue


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


def retire_queue(pool: QueuePool) -> None:
    """Let the queue of `pool`, which is disposed, keep nothing that comes back."""
    queue = queue_of(pool)
    retired = _RETIRED.get(type(queue))
    if retired is not None:
        queue.__class__ = retired
