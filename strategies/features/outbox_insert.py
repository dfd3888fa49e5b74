"""Writing messages into the outbox."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Double,
    Executable,
    Insert,
    Table,
    bindparam,
    func,
    insert,
    literal_column,
    select,
)
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from .outbox_table import TABLE, database_now

LEASE_S = 60.0
"""Who has claimed a row has so long to send it; after that another sender takes it."""
CHANNEL = TABLE
"""PostgreSQL's NOTIFY tells senders on it that there is something to send."""
ROWS_AT_ONCE = 1000
"""Of one INSERT."""
BYTES_AT_ONCE = 4 * 2**20
"""Of the messages of one INSERT, and of those that a sender has in its memory."""

#: What executes the statements: they commit nothing.
Executor = Session | Connection


@dataclass(frozen=True, slots=True)
class Message:
    """What a row is made of."""

    task_id: str
    """As `recorded_id` has it."""
    task: str
    """The name of the task."""
    text: str
    """What is published, as JSON."""
    expires_at: float | None = None
    """Seconds since 1970; not sent any more after that."""
    nesting: int | None = None
    """Its receiver is recorded as completed, under its id and so many replacements: until then the row is kept. None:
    until it is sent."""


def write(
    executor: Executor, table: Table, messages: Sequence[Message], *, lease_s: float = LEASE_S, notify: bool = False
) -> str:
    """Put the messages of a transaction into the outbox, in their order and within it; return their batch.

    Their positions in it are 0, 1, 2 ... One INSERT, and one round trip, for up to a thousand.

    Args:
        lease_s: Nobody claims them before so many seconds have passed.
        notify: Tell PostgreSQL's listeners of it when the transaction is committed.
    """
    batch = uuid.uuid4().hex
    rows = [
        {
            "batch": batch,
            "position": position,
            "lease_s": lease_s,
            "task_id": message.task_id,
            "task": message.task[:255],
            "expires_at": message.expires_at,
            "nesting": message.nesting,
            "message": message.text,
        }
        for position, message in enumerate(messages)
    ]
    notify = notify and dialect_of(executor, table) == "postgresql"
    for part in _parts(rows):
        if len(part) == 1:
            executor.execute(made_once(table, _insert_one, notify), part[0])
        else:
            values = [{name: value for name, value in row.items() if name != "lease_s"} for row in part]
            lease: ColumnElement[float] = literal_column(repr(float(lease_s)), Double())
            statement = insert(table).inline().values([{**row, **_times(lease)} for row in values])
            executor.execute(_notifying(table, statement) if notify else statement)
        notify = False
    return batch


def _times(lease_s: ColumnElement[float]) -> dict[str, ColumnElement[float]]:
    return {"created_at": database_now(), "due_at": database_now() + lease_s}


def _insert_one(table: Table, notify: bool) -> Executable:
    names = ("batch", "position", "task_id", "task", "expires_at", "nesting", "message")
    values: dict[str, Any] = {name: bindparam(name, type_=table.c[name].type) for name in names}
    # Inline: nothing is read back, so who only sends need not be allowed to read the table.
    statement = insert(table).inline().values({**values, **_times(bindparam("lease_s", type_=Double()))})
    return _notifying(table, statement) if notify else statement


def _notifying(table: Table, statement: Insert) -> Executable:
    # A CTE that changes data is executed to its end, whatever is asked of it.
    inserted = statement.returning(literal_column("1").label("one")).cte("inserted")
    return select(func.pg_notify(CHANNEL, table.fullname)).where(select(inserted).exists())


def made_once(table: Table, make: Callable[[Table, bool], Executable], variant: bool = False) -> Executable:
    """Return what `make(table, variant)` does, made once: to build a statement takes longer than to send it."""
    key = (make.__name__, variant)
    found: Executable | None = table.info.get(key)
    if found is None:
        found = table.info[key] = make(table, variant)
    return found


def _parts(rows: list[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        length = len(row["message"])
        if part and (len(part) == ROWS_AT_ONCE or size + length > BYTES_AT_ONCE):
            yield part
            part, size = [], 0
        part.append(row)
        size += length
    if part:
        yield part


def dialect_of(executor: Executor, table: Table) -> str:
    """Return the name of the dialect of the database that `table` is in."""
    if isinstance(executor, Connection):
        return executor.dialect.name
    return executor.get_bind(clause=select(table)).dialect.name
