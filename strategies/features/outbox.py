"""The outbox: messages written into a table by the transaction that they belong to, to be sent once it is committed.

One row a message. `due_at` says from when on a sender may take it: a lease while one sends it, a pause when it failed,
NULL when it is set aside. Nothing here holds a transaction open while a message is sent: rows are claimed in one
transaction, and what has become of them is recorded in another. Killed in between, the lease ends, and another sender
takes over. At least once, never lost.

A row whose receiver is recorded as completed (`nesting`) is kept until that is so: `outbox_kept`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Executable,
    Table,
    bindparam,
    case,
    delete,
    func,
    literal,
    null,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.engine import Connection

from .outbox_insert import (
    BYTES_AT_ONCE,
    CHANNEL,
    LEASE_S,
    ROWS_AT_ONCE,
    Executor,
    Message,
    dialect_of,
    made_once,
    write,
)
from .outbox_table import HOW_TO_CREATE, LONGEST, TABLE, chosen_table, database_now, outbox_table, undeclared

__all__ = [
    "CHANNEL",
    "HOW_TO_CREATE",
    "LEASE_S",
    "TABLE",
    "Executor",
    "Message",
    "chosen_table",
    "claim",
    "count",
    "drop",
    "listed",
    "load",
    "outbox_table",
    "record",
    "retry",
    "undeclared",
    "write",
]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 600.0
"""Between two attempts of a message that cannot be sent; doubles from one to the next."""
LONGEST_ERROR = 2000
_DOUBLED = 5
"""So often the pause before a message is sent again doubles."""
_PAUSES_S = {attempts: FIRST_PAUSE_S * 2**attempts for attempts in range(7)}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the outbox, without its message, which may be long."""

    id: int
    batch: str
    position: int
    """In the transaction that has written it."""
    created_at: float
    due_at: float | None
    """Seconds since 1970 by the database's clock; None: set aside."""
    attempts: int
    task_id: str
    task: str
    expires_at: float | None
    error: str | None
    nesting: int | None
    """Kept until its receiver is recorded as completed, after so many replacements; None: until it is sent."""
    sends: int
    """So often the broker has got it."""
    length: int
    """Characters, or bytes, of the message."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What is in the outbox."""

    waiting: int
    set_aside: int
    oldest_s: float | None
    """Age of the oldest message that waits, in seconds; None where none does."""
    sent: int = 0
    """Are with the broker, and wait for their receivers."""


@dataclass(slots=True)
class Record:
    """What has become of rows; a row is named by its id, or by its batch and its position."""

    gone: list[Any] = field(default_factory=list)
    """Sent, or expired: deleted."""
    sent: list[Any] = field(default_factory=list)
    """Sent, and kept until their receivers have completed."""
    resend_s: float = 0.0
    """After so long, and longer each time, `sent` are sent again."""
    longest_s: float = 0.0
    """And at last after so long, or after `resend_s` where that is longer."""
    failed: dict[Any, str] = field(default_factory=dict)
    """Could not be sent, by their own fault, with the error."""
    again: list[Any] = field(default_factory=list)
    """Not sent, by no fault of theirs."""
    pause_s: float = 0.0
    """After that long `again` may be claimed."""

    def __bool__(self) -> bool:
        return bool(self.gone or self.sent or self.failed or self.again)


def _delete_one(table: Table, _: bool) -> Executable:
    return delete(table).where(table.c.batch == bindparam("b"), table.c.position == bindparam("p"))


def lock_no_gaps(executor: Executor, table: Table) -> None:
    """Let the transaction that begins with this lock the rows that it changes, and nothing between them: at REPEATABLE
    READ, InnoDB's default, who commits a message would wait for who deletes another's, or fail with a deadlock.

    Where the server logs statements InnoDB changes nothing at another level: there a deadlock is tried again.
    """
    if dialect_of(executor, table) in {"mysql", "mariadb"} and not _logs_statements(executor, table):
        executor.execute(text("SET TRANSACTION ISOLATION LEVEL READ COMMITTED"))


_LOGS_STATEMENTS = "celery_alchemy_logs_statements"
"""Attribute of a dialect, each Engine's own: its server was asked for its `binlog_format`."""


def _logs_statements(executor: Executor, table: Table) -> bool:
    bind = executor if isinstance(executor, Connection) else executor.get_bind(clause=select(table))
    known: bool | None = getattr(bind.dialect, _LOGS_STATEMENTS, None)
    if known is None:
        # In a session of its own, for it begins a transaction; the variables are the server's, whoever asks.
        with bind.engine.connect() as connection:
            known = connection.scalar(text("SELECT @@log_bin AND @@binlog_format = 'STATEMENT'")) == 1
        setattr(bind.dialect, _LOGS_STATEMENTS, known)
    return known


# -- sending -----------------------------------------------------------------------------------------------------------


def claim(executor: Executor, table: Table, batches: int = 50) -> list[Row]:
    """Take what is due of up to so many transactions, the oldest first, for `LEASE_S` seconds; return the rows in
    their order, without their messages.

    All that is due of a transaction is taken by one sender: else its messages might overtake one another.
    """
    dialect = dialect_of(executor, table)
    if dialect == "sqlite":
        # Before it reads anything: one who has read cannot write any more once another has.
        executor.execute(update(table).where(table.c.id.is_(None)).values(attempts=0))
    due = table.c.due_at <= database_now()
    earlier = table.alias("earlier")
    # Of those that come before it in its transaction, what has failed is not waited for.
    in_front = or_(earlier.c.due_at <= database_now(), earlier.c.due_at.is_not(None) & (earlier.c.attempts == 0))
    in_front &= earlier.c.sends == 0  # nor what the broker has
    behind = select(earlier.c.id).where(earlier.c.batch == table.c.batch, earlier.c.id < table.c.id, in_front).exists()
    heads = select(table.c.id, table.c.batch).where(due, ~behind).order_by(table.c.id).limit(batches)
    if dialect == "postgresql":
        found = executor.execute(heads.with_for_update(skip_locked=True)).all()
    else:
        found = executor.execute(heads).all()
        if dialect != "sqlite" and found:
            # InnoDB locks every row that it looks at, sorted out or not, and the entries of the index that it goes by:
            # another index than its competitors', and they wait for each other.
            keys = [row.id for row in found]
            lock = select(table.c.id, table.c.batch).where(table.c.id.in_(keys), due)
            lock = lock.with_hint(table, "FORCE INDEX (PRIMARY)")
            found = executor.execute(lock.with_for_update(skip_locked=True)).all()
    taken = [row.batch for row in found]
    if not taken:
        return []
    rows = _rows(executor, table, table.c.batch.in_(taken), due)
    _set(executor, table, [row.id for row in rows], due_at=database_now() + literal(LEASE_S))
    return rows


def load(executor: Executor, table: Table, rows: Sequence[Row]) -> tuple[int, dict[int, str]]:
    """Return the messages of the first of `rows`, by id, and of how many: at least one, and no more than fit into
    memory. What is not there any more was dropped.

    A message that is too long for the table as this version makes it is not read: it is an empty string.
    """
    size = 0
    keys: list[int] = []
    for row in rows:
        size += row.length if row.length <= LONGEST else 0
        if keys and (size > BYTES_AT_ONCE or len(keys) == ROWS_AT_ONCE):
            break
        keys.append(row.id)
    short = case((func.length(table.c.message) <= LONGEST, table.c.message), else_="")
    found = executor.execute(select(table.c.id, short.label("text")).where(table.c.id.in_(keys)))
    return len(keys), {row.id: row.text for row in found}


def record(executor: Executor, table: Table, what: Record, *, attempts: int = 10) -> list[Row]:
    """Write down what has become of rows that were claimed, or written; return those that are set aside now.

    Args:
        attempts: After so many failures a message is set aside.
    """
    if len(what.gone) == 1 and isinstance(what.gone[0], tuple):
        executor.execute(made_once(table, _delete_one), dict(zip("bp", what.gone[0], strict=True)))
    elif what.gone:
        for condition in _named(table, what.gone):
            executor.execute(delete(table).where(condition))
    for condition in _named(table, what.sent):
        executor.execute(update(table).where(condition).ordered_values(*sent_values(table, what, attempts)))
    for key, error in what.failed.items():
        _fail(executor, table, key, error, attempts)
    if what.again:
        for condition in _named(table, what.again):
            due_at = database_now() + literal(what.pause_s)
            executor.execute(update(table).where(condition, table.c.due_at.is_not(None)).values(due_at=due_at))
    return [
        row
        for condition in _named(table, [*what.failed, *what.sent])
        for row in _rows(executor, table, condition, table.c.due_at.is_(None))
    ]


_NOT_RECEIVED = "sent {} times, and its receiver has recorded nothing"


def sent_values(table: Table, what: Record, most: int) -> Sequence[tuple[Any, Any]]:
    """Return what a row says that is kept once it is sent: when it is sent again, or that it was sent often enough."""
    counted, longest_s = table.c.sends + 1, max(what.resend_s, what.longest_s)
    pauses_s = {sends: min(what.resend_s * 2**sends, longest_s) for sends in range(_DOUBLED + 1)}
    again = database_now() + case(pauses_s, value=table.c.sends, else_=pauses_s[_DOUBLED])
    # In this order: MySQL takes what is assigned first for what was there.
    return (
        (table.c.due_at, case((counted <= most, again), else_=null())),
        (table.c.error, case((counted <= most, null()), else_=_NOT_RECEIVED.format(most + 1))),
        (table.c.sends, counted),
    )


def _fail(executor: Executor, table: Table, key: Any, error: str, attempts: int) -> None:
    counted = table.c.attempts + 1
    pause_s = case(_PAUSES_S, value=table.c.attempts, else_=LONGEST_PAUSE_S)
    again = case((counted < attempts, database_now() + pause_s), else_=null())
    # What is in the row may be in the error, and no column may hold it: then nothing would be recorded of the others.
    error = error.encode("ascii", "backslashreplace").decode("ascii").replace("\0", "\\0")[:LONGEST_ERROR]
    # In this order: MySQL takes what is assigned first for what was there.
    values = ((table.c.due_at, again), (table.c.attempts, counted), (table.c.error, error))
    for condition in _named(table, [key]):
        executor.execute(update(table).where(condition, table.c.due_at.is_not(None)).ordered_values(*values))


def _named(table: Table, keys: Iterable[Any]) -> Iterable[ColumnElement[bool]]:
    """Yield conditions that hold for the rows named by `keys`: ids, or pairs of batch and position."""
    ids: list[int] = []
    positions: dict[str, list[int]] = {}
    for key in keys:
        if isinstance(key, tuple):
            positions.setdefault(key[0], []).append(key[1])
        else:
            ids.append(key)
    for start in range(0, len(ids), ROWS_AT_ONCE):
        yield table.c.id.in_(ids[start : start + ROWS_AT_ONCE])
    for batch, found in positions.items():
        # By the whole of a unique key, so that InnoDB locks these rows and no gap that others write into.
        for start in range(0, len(found), ROWS_AT_ONCE):
            part = found[start : start + ROWS_AT_ONCE]
            same = table.c.position == part[0] if len(part) == 1 else table.c.position.in_(part)
            yield (table.c.batch == batch) & same


# -- looking at it -----------------------------------------------------------------------------------------------------


def chosen(
    table: Table, *, task_ids: Sequence[str] = (), task: str | None = None, set_aside: bool = False
) -> list[ColumnElement[bool]]:
    """Return the conditions for rows with one of these ids of tasks, of the task of that name, and set aside.

    None of them: for all rows.
    """
    conditions: list[ColumnElement[bool]] = []
    if task_ids:
        conditions.append(table.c.task_id.in_(task_ids))
    if task is not None:
        conditions.append(table.c.task == task)
    if set_aside:
        conditions.append(table.c.due_at.is_(None))
    return conditions


def count(executor: Executor, table: Table) -> Counts:
    """Return how many messages wait and are set aside, and the age of the oldest that waits: one round trip."""
    waits = table.c.due_at.is_not(None)
    oldest = func.min(case((waits & (table.c.sends == 0), table.c.created_at)))
    row = executor.execute(
        select(
            func.count(table.c.due_at).label("in_hand"),
            func.count(case((waits & (table.c.sends > 0), 1))).label("sent"),
            func.count().label("all"),
            (database_now() - oldest).label("oldest_s"),
        ).select_from(table)
    ).one()
    in_hand, sent, everything, oldest_s = row
    age_s = max(0.0, float(oldest_s)) if oldest_s is not None else None
    return Counts(in_hand - sent, everything - in_hand, age_s, sent)


def listed(executor: Executor, table: Table, conditions: Sequence[ColumnElement[bool]], limit: int = 100) -> list[Row]:
    """Return rows, the oldest first; `conditions` as of `chosen`."""
    return _rows(executor, table, *conditions, limit=limit)


def retry(executor: Executor, table: Table, conditions: Sequence[ColumnElement[bool]]) -> int:
    """Let rows be sent at once, with all their attempts before them; return how many there were."""
    values = {"due_at": database_now(), "attempts": 0, "sends": 0, "error": null()}
    # What a sender has claimed stays its own.
    free = or_(table.c.due_at.is_(None), table.c.attempts > 0, table.c.sends > 0, table.c.due_at <= database_now())
    found: Any = executor.execute(update(table).where(free, *conditions).values(values))
    if dialect_of(executor, table) == "postgresql":
        executor.execute(select(func.pg_notify(CHANNEL, table.fullname)))
    return int(found.rowcount)


def drop(executor: Executor, table: Table, conditions: Sequence[ColumnElement[bool]]) -> int:
    """Delete rows, which are then never sent; return how many there were."""
    found: Any = executor.execute(delete(table).where(*conditions))
    return int(found.rowcount)


def _rows(executor: Executor, table: Table, *conditions: ColumnElement[bool], limit: int | None = None) -> list[Row]:
    columns = [table.c[name] for name in Row.__dataclass_fields__ if name != "length"]
    found: Any = executor.execute(
        select(*columns, func.length(table.c.message).label("length"))
        .where(*conditions)
        .order_by(table.c.id)
        .limit(limit)
    )
    return [Row(*row) for row in found]


def _set(executor: Executor, table: Table, keys: Sequence[int], **values: Any) -> None:
    for condition in _named(table, keys):
        executor.execute(update(table).where(condition).values(**values))
