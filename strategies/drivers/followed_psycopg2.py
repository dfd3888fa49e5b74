"""psycopg2: a connection that counts the transactions that are ended on it. Nothing private of the driver is used."""

from __future__ import annotations

from typing import Any

from psycopg2 import extensions

from ..scope import here


class FollowedConnection(extensions.connection):  # type: ignore[misc]
    """A connection of psycopg2's that counts COMMIT and ROLLBACK, SQLAlchemy's included."""

    celery_alchemy_ends: int = -1_000_000
    """How many there were since SQLAlchemy began its transaction; below 0 before its first one."""

    _begins_within = False

    def note_block(self) -> None:
        """A `with` block of the driver's begins: it ends what it has begun."""
        self._begins_within = self.get_transaction_status() == extensions.TRANSACTION_STATUS_IDLE

    def end_block(self) -> None:
        """That block has ended: where it has begun the transaction, it was right to end it."""
        if self._begins_within:
            self.celery_alchemy_ends -= 1
            here().ends += 1
        self._begins_within = False

    def __enter__(self) -> FollowedConnection:
        self.note_block()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> Any:
        try:
            return super().__exit__(*error)
        finally:
            self.end_block()

    def commit(self) -> None:
        self.celery_alchemy_ends += 1
        super().commit()

    def rollback(self) -> None:
        self.celery_alchemy_ends += 1
        super().rollback()
