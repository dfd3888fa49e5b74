"""Rows of the outbox that are kept until their receivers have ended.

A broker may lose a message that it has confirmed, or that a worker was about to take. Its row is sent again then, after
a pause: a receiver that has completed meanwhile does not run again. Commits nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import Table, delete, select

from .completed import Key
from .outbox_insert import ROWS_AT_ONCE, Executor


def drop_of(executor: Executor, table: Table, keys: Collection[Key]) -> int:
    """Delete the rows of the requests with these keys, which have ended; return how many there were."""
    deleted = 0
    for ids in _ids_of(executor, table, keys):
        found: Any = executor.execute(delete(table).where(table.c.id.in_(ids)))
        deleted += int(found.rowcount)
    return deleted


def drop_all_of(executor: Executor, table: Table, task_id: str) -> int:
    """Delete the rows of a request that has ended, however often it was replaced; return how many there were."""
    found = executor.execute(select(table.c.id, table.c.task_id, table.c.nesting).where(table.c.task_id == task_id))
    ids = [row.id for row in found if row.nesting is not None and row.task_id == task_id]
    if ids:
        executor.execute(delete(table).where(table.c.id.in_(ids)))
    return len(ids)


def _ids_of(executor: Executor, table: Table, keys: Collection[Key]) -> Iterable[list[int]]:
    """Yield the ids of the rows with these keys, some at a time.

    They are compared here: to a database "a" and "A" may be the same. And a row is changed by its id alone, so that
    InnoDB locks none that others write.
    """
    wanted, task_ids = frozenset(keys), sorted({key.task_id for key in keys})
    for start in range(0, len(task_ids), ROWS_AT_ONCE):
        here = table.c.task_id.in_(task_ids[start : start + ROWS_AT_ONCE])
        found = executor.execute(select(table.c.id, table.c.task_id, table.c.nesting).where(here))
        ids = [row.id for row in found if row.nesting is not None and Key(row.task_id, row.nesting) in wanted]
        if ids:
            yield ids
