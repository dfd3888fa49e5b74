"""States of tasks and groups beside the rows of completed tasks, in the same table: for a result backend.

They have the id of the task, or of the group, and a nesting below 0. Commits nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Integer, Table, cast, delete, insert, select, update
from sqlalchemy.engine import Connection

from .completed import REPLACED, SENT, Record
from .outbox_insert import dialect_of
from .outbox_table import database_now

OF_TASK, OF_GROUP, OF_CHORD, OF_MEMBER = -1, -2, -3, -4
"""The last: a task that a chord waits for, until it is counted."""
ASKED_AT_ONCE = 1000


def states_of(connection: Connection, table: Table, ids: Iterable[str], kind: int = OF_TASK) -> dict[str, Record]:
    """Return what is known of each id: that a task has completed, else its state. Unknown ids are left out.

    Args:
        kind: `OF_TASK`, `OF_GROUP` or `OF_CHORD`.
    """
    wanted = list(ids)
    if len(wanted) > ASKED_AT_ONCE:
        parts = [wanted[start : start + ASKED_AT_ONCE] for start in range(0, len(wanted), ASKED_AT_ONCE)]
        return {one: record for part in parts for one, record in states_of(connection, table, part, kind).items()}
    columns = (table.c.task_id, table.c.nesting, table.c.content_type, table.c.result, table.c.note)
    statement = select(*columns, table.c.completed_at).where(table.c.task_id.in_(wanted))
    statement = statement.where(table.c.nesting >= kind if kind == OF_TASK else table.c.nesting == kind)
    found: dict[str, Record] = {}
    # A note says that the task has not ended with this row: it was replaced, or had committed before its end.
    for task_id, _, *record in connection.execute(statement.order_by(table.c.nesting)):
        one = Record(*record)
        if is_state(one) or (one.note in {None, SENT} and one.content_type != REPLACED):
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


# -- chords ------------------------------------------------------------------------------------------------------------


def expect(connection: Connection, table: Table, group_id: str, members: str, ids: Iterable[str]) -> None:
    """Write down a chord, and each task that it waits for; again, where it is there: all of them count once more.

    Args:
        members: Its results, encoded.
    """
    now = connection.scalar(select(database_now()))
    rows = [{"task_id": one, "nesting": OF_MEMBER, "task": STATE, "note": STATE, "completed_at": now} for one in ids]
    if rows:
        connection.execute(_insert_new(connection, table), rows)
    put(connection, table, group_id, OF_CHORD, Record(str(len(rows)), members))


def _insert_new(connection: Connection, table: Table) -> Any:
    dialect = dialect_of(connection, table)
    if dialect in {"mysql", "mariadb"}:
        return insert(table).prefix_with("IGNORE")
    from sqlalchemy.dialects import postgresql, sqlite

    return (sqlite if dialect == "sqlite" else postgresql).insert(table).on_conflict_do_nothing()


def count(connection: Connection, table: Table, group_id: str, task_id: str) -> int | None:
    """Count a member of a chord, in three statements; return how many it still waits for, None where this one has been
    counted before, or was not expected."""
    if not claim(connection, table, task_id, OF_MEMBER):
        return None
    here = (table.c.task_id == group_id, table.c.nesting == OF_CHORD)
    left = cast(cast(table.c.content_type, Integer) - 1, table.c.content_type.type)
    connection.execute(update(table).where(*here).values(content_type=left))
    found = connection.scalar(select(table.c.content_type).where(*here))
    return int(found) if found is not None else None


def finish(connection: Connection, table: Table, group_id: str, ids: Iterable[str]) -> bool:
    """Delete a chord, and what it still waits for; tell whether this transaction is the one that does."""
    wanted = list(ids)
    for start in range(0, len(wanted), ASKED_AT_ONCE):
        part = wanted[start : start + ASKED_AT_ONCE]
        connection.execute(delete(table).where(table.c.task_id.in_(part), table.c.nesting == OF_MEMBER))
    return claim(connection, table, group_id, OF_CHORD)


def drop_old(connection: Connection, table: Table, older_than_s: float) -> int:
    """Delete the states that are older; return how many there were."""
    old = table.c.completed_at < database_now() - older_than_s
    return int(connection.execute(delete(table).where(table.c.nesting < 0, old)).rowcount)
