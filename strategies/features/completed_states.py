"""States of tasks and groups beside the rows of completed tasks, in the same table: for a result backend.

They have the id of the task, or of the group, and a nesting below 0. Commits nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Table, delete, select
from sqlalchemy.engine import Connection

from .completed import SENT, Record
from .outbox_table import database_now

OF_TASK, OF_GROUP, OF_CHORD = -1, -2, -3


def states_of(connection: Connection, table: Table, ids: Iterable[str], kind: int = OF_TASK) -> dict[str, Record]:
    """Return what is known of each id: that a task has completed, else its state. Unknown ids are left out.

    Args:
        kind: `OF_TASK`, `OF_GROUP` or `OF_CHORD`.
    """
    columns = (table.c.task_id, table.c.nesting, table.c.content_type, table.c.result, table.c.note)
    statement = select(*columns, table.c.completed_at).where(table.c.task_id.in_(list(ids)))
    statement = statement.where(table.c.nesting >= kind if kind == OF_TASK else table.c.nesting == kind)
    found: dict[str, Record] = {}
    # A note says that the task has not ended with this row: it was replaced, or had committed before its end.
    for task_id, _, *record in connection.execute(statement.order_by(table.c.nesting)):
        one = Record(*record)
        if one.note in {None, SENT} or is_state(one):
            found[task_id] = one
    return found


STATE = "state"
"""The note of a row that is a state."""


def is_state(record: Record) -> bool:
    """Tell whether a row is the state of a task, and not what it has returned."""
    return record.note == STATE


def put(connection: Connection, table: Table, task_id: str, kind: int, record: Record) -> None:
    """Write a state, whether there is one or not. One statement."""
    values = {"content_type": record.content_type, "result": record.result, "completed_at": database_now()}
    statement: Any
    if connection.dialect.name in {"mysql", "mariadb"}:
        from sqlalchemy.dialects import mysql

        # Not an UPDATE first: where there is no row, InnoDB locks the gap, and two such wait for each other.
        statement = mysql.insert(table).values(task_id=task_id, nesting=kind, task=STATE, note=STATE, **values)
        statement = statement.on_duplicate_key_update(**values)
    else:
        from sqlalchemy.dialects import postgresql, sqlite

        make = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
        statement = make(table).values(task_id=task_id, nesting=kind, task=STATE, note=STATE, **values)
        statement = statement.on_conflict_do_update(index_elements=["task_id", "nesting"], set_=values)
    connection.execute(statement)


def drop(connection: Connection, table: Table, task_id: str, kind: int) -> None:
    """Delete a state. What says that a task has completed stays."""
    connection.execute(delete(table).where(table.c.task_id == task_id, table.c.nesting == kind))


def claim(connection: Connection, table: Table, task_id: str, kind: int) -> bool:
    """Delete a state; tell whether this transaction is the one that does."""
    return bool(connection.execute(delete(table).where(table.c.task_id == task_id, table.c.nesting == kind)).rowcount)


def drop_old(connection: Connection, table: Table, older_than_s: float) -> int:
    """Delete the states that are older; return how many there were."""
    old = table.c.completed_at < database_now() - older_than_s
    return int(connection.execute(delete(table).where(table.c.nesting < 0, old)).rowcount)
