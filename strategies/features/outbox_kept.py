"""Rows of the outbox that are kept until their receivers have completed: until the table of completed tasks has them.

A broker may lose a message that it has confirmed, or that a worker was about to take. Its row is sent again then, after
a pause: a receiver that has completed meanwhile does not run again. Commits nothing.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Table, bindparam, delete, select, update

from .completed import Key
from .outbox_insert import Executor, dialect_of
from .outbox_table import database_now

RECEIVED_AT_ONCE = 1000


def drop_received(executor: Executor, table: Table, completed: Table, most: int = RECEIVED_AT_ONCE) -> int:
    """Delete up to so many rows whose receivers have completed; return how many there were."""
    same = (completed.c.task_id == table.c.task_id) & (completed.c.nesting == table.c.nesting)
    found = select(table.c.id).join(completed, same).where(table.c.nesting.is_not(None)).limit(most)
    if dialect_of(executor, table) == "postgresql":
        found = found.with_for_update(of=table, skip_locked=True)
    ids = list(executor.execute(found).scalars())
    if ids:
        executor.execute(delete(table).where(table.c.id.in_(ids)))
    return len(ids)


def drop_of(executor: Executor, table: Table, key: Key) -> int:
    """Delete the rows of the request with this key: it has ended without completing; return how many there were."""
    found: Any = executor.execute(delete(table).where(*_of(table, key)))
    return int(found.rowcount)


def postpone(executor: Executor, table: Table, key: Key, seconds: float) -> int:
    """Send the message of the request with this key no earlier than in so many seconds: it has been received, and is
    tried again by a message of its own; return how many rows there were."""
    due_at = database_now() + bindparam("later", seconds)
    found: Any = executor.execute(update(table).where(*_of(table, key), table.c.due_at < due_at).values(due_at=due_at))
    return int(found.rowcount)


def _of(table: Table, key: Key) -> tuple[ColumnElement[bool], ...]:
    return table.c.task_id == key.task_id, table.c.nesting == key.nesting
