"""Rows of tasks that have completed: looked at, written, forgotten, pruned. Commits nothing.

A row is claimed by its INSERT. Where a server can say at once that another transaction has the same row in hand, it
does: who waits for it then holds no connection meanwhile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Executable,
    Table,
    bindparam,
    case,
    delete,
    func,
    insert,
    inspect,
    null,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolProxiedConnection

from ..drivers.base import code_of, driver_of
from ..drivers.url import shown
from ..errors import InvalidSetting
from .completed_table import HOW_TO_CREATE
from .outbox_insert import dialect_of, made_once
from .outbox_table import database_now

_SQLITE_CONSTRAINT, _SQLITE_BUSY = 19, frozenset({5, 6})
_DUPLICATE = frozenset({"23505", 1062})
#: Another transaction has the row in hand, or the server says no more than that something took too long: PostgreSQL's
#: NOT NULL of a row whose lock was not free, lock and statement timeouts, conflicts.
_HELD = frozenset({"23502", "55P03", "57014", "40001", "40P01", 1205, 1213, 1020, 3572, 1969, 3024})


#: The note of a row whose transaction has put into the outbox what comes after the task: a copy sends none of it.
SENT = json.dumps({"sent": True})


#: The content type of a row whose task was replaced, where its transaction has put the replacement into the outbox.
REPLACED = "replaced"


@dataclass(frozen=True, slots=True)
class Key:
    """What names a task request: delivered again, it has the same; each replacement has one of its own."""

    task_id: str
    nesting: int = 0

    def lock(self, table: Table) -> int:
        """Return the number of the advisory lock that stands for the row of this key."""
        text = f"{table.fullname}:{self.nesting}:{self.task_id}"
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)


@dataclass(frozen=True, slots=True)
class Record:
    """What a row says beside its key."""

    content_type: str | None = None
    """How `result` is encoded; None: it is None."""
    result: str | None = None
    note: str | None = None
    """What else is to be known, as JSON: see the room that writes it."""
    completed_at: float = 0.0
    """Seconds since 1970, by the database's clock."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A row, for people."""

    task_id: str
    nesting: int
    task: str
    completed_at: float
    length: int | None
    """Characters of the result; None where it has none."""
    note: str | None


class Claim(Enum):
    """What became of an INSERT that did not succeed."""

    HELD = auto()
    """Another transaction has the same row in hand, and may commit it or not."""
    DONE = auto()
    """The row is there."""


def _look(table: Table, _: bool) -> Executable:
    columns = (table.c.content_type, table.c.result, table.c.note, table.c.completed_at)
    return select(*columns).where(table.c.task_id == bindparam("i"), table.c.nesting == bindparam("n"))


def look(connection: Connection | Session, table: Table, key: Key) -> Record | None:
    """Return what the row of `key` says; None where there is none. One statement."""
    row = connection.execute(made_once(table, _look), {"i": key.task_id, "n": key.nesting}).one_or_none()
    return Record(*row) if row is not None else None


def look_alone(connection: PoolProxiedConnection, dialect: Dialect, table: Table, key: Key) -> Record | None:
    """Do what `look` does, leaving no transaction open: one round trip, where the driver `looks_alone`."""
    query, values = _text_of(dialect, table, _look, False, {"i": key.task_id, "n": key.nesting})
    row = driver_of(dialect).look_alone(dialect, connection, query, values)
    return Record(*row) if row is not None else None


def _insert(table: Table, locks: bool) -> Executable:
    task_id: Any = bindparam("i", type_=table.c.task_id.type)
    if locks:  # NULL where another transaction has the lock, which the column refuses
        free = func.pg_try_advisory_xact_lock(bindparam("lock", type_=BigInteger()))
        task_id = case((free, task_id), else_=null())
    names = ("task", "content_type", "result", "note")
    values: dict[str, Any] = {name: bindparam(f"v_{name}", type_=table.c[name].type) for name in names}
    values |= {"task_id": task_id, "nesting": bindparam("n"), "completed_at": database_now()}
    return insert(table).inline().values(values)


def _insert_without_waiting(table: Table, _: bool) -> Executable:
    # MariaDB's. MySQL has no word for it: there, who comes second waits for the lock, at most as long as it lets.
    from sqlalchemy.dialects.mysql import dialect as mysql_dialect

    dialect = mysql_dialect()
    names = {"task_id": "i", "nesting": "n", "task": "v_task", "content_type": "v_content_type"}
    names |= {"result": "v_result", "note": "v_note"}
    columns = ", ".join([*names, "completed_at"])
    places = ", ".join([*(f":{place}" for place in names.values()), str(database_now().compile(dialect=dialect))])
    return text(
        f"SET STATEMENT innodb_lock_wait_timeout=0 FOR INSERT INTO {dialect.identifier_preparer.format_table(table)} "  # noqa: S608
        f"({columns}) VALUES ({places})"
    )


def _values(key: Key, record: Record, **more: Any) -> dict[str, Any]:
    texts = {"v_content_type": record.content_type, "v_result": record.result, "v_note": record.note}
    return {"i": key.task_id, **texts, **more}


def written(connection: Connection, table: Table, key: Key, task: str, record: Record | None) -> tuple[str, Any]:
    """Return what `write` would execute on PostgreSQL without waiting, as a text of the driver and its parameters."""
    values = _values(key, record or Record(), n=key.nesting, v_task=task[:255], lock=key.lock(table))
    return _text_of(connection.dialect, table, _insert, True, values)


def inserted(connection: Connection, table: Table, key: Key, task: str, record: Record) -> tuple[str, Any]:
    """Return what `write` would execute, waiting, as a text of the driver and its parameters."""
    values = _values(key, record, n=key.nesting, v_task=task[:255])
    return _text_of(connection.dialect, table, _insert, False, values)


def completing(connection: Connection, table: Table, key: Key, record: Record) -> tuple[str, Any]:
    """Return what `complete` would execute, as a text of the driver and its parameters."""
    return _text_of(connection.dialect, table, _update, False, _values(key, record, k=key.nesting))


def _text_of(dialect: Dialect, table: Table, make: Any, variant: bool, values: Any) -> tuple[str, Any]:
    name = (make.__name__, variant, dialect.driver, dialect.is_async)
    compiled = table.info.get(name)
    if compiled is None:
        compiled = table.info[name] = make(table, variant).compile(dialect=dialect)
    values = compiled.construct_params(values)
    return compiled.string, tuple(values[one] for one in compiled.positiontup) if compiled.positional else values


def write(connection: Connection, table: Table, key: Key, task: str, record: Record | None, *, waits: bool) -> None:
    """Insert the row of `key`. One statement.

    Args:
        task: The task's name.
        record: What it says; None: no more than that the task has begun.
        waits: For another transaction that has it in hand; False: refuse at once, where the server can.
    """
    record = record or Record()
    locks = connection.dialect.name == "postgresql" and not waits
    values = _values(key, record, n=key.nesting, v_task=task[:255])
    if locks:
        values["lock"] = key.lock(table)
    if not waits and getattr(connection.dialect, "is_mariadb", False):
        connection.exec_driver_sql(*_text_of(connection.dialect, table, _insert_without_waiting, False, values))
    else:
        connection.exec_driver_sql(*_text_of(connection.dialect, table, _insert, locks, values))


def _update(table: Table, _: bool) -> Executable:
    names = ("content_type", "result", "note")
    values: dict[str, Any] = {name: bindparam(f"v_{name}", type_=table.c[name].type) for name in names}
    here = (table.c.task_id == bindparam("i"), table.c.nesting == bindparam("k"))
    return update(table).where(*here).values(values)


def complete(connection: Connection, table: Table, key: Key, record: Record) -> bool:
    """Let the row of `key` say `record`; tell whether there is one. One statement."""
    return bool(connection.exec_driver_sql(*completing(connection, table, key, record)).rowcount)


def claim_of(error: DBAPIError, connection: Connection | Engine) -> Claim | None:
    """Return what an INSERT says that failed with `error`; None: something else is wrong."""
    if error.orig is None:
        return None
    return _claim_of(driver_of(connection.dialect).code_of(error.orig), error.orig)


def claim_along(error: BaseException, table: Table, *, at_end: bool = False) -> Claim | None:
    """Return what the INSERT says that was sent along with another statement, where `error`, the server's answer to
    both, is about its table; None: it is not, or something else is wrong.

    Args:
        at_end: It was sent with nothing but the COMMIT. What names no table, a timeout for example, is about it then.
    """
    named = getattr(getattr(error, "diag", None), "table_name", None)
    is_about_it = named == table.name or (at_end and named is None)
    return _claim_of(code_of(error), error) if is_about_it else None


def _claim_of(code: Any, orig: BaseException) -> Claim | None:
    if code is None:
        number = getattr(orig, "sqlite_errorcode", None)
        number = number & 0xFF if isinstance(number, int) else None
        if number == _SQLITE_CONSTRAINT:
            return Claim.DONE
        return Claim.HELD if number in _SQLITE_BUSY else None
    if code in _DUPLICATE:
        return Claim.DONE
    return Claim.HELD if code in _HELD else None


def explained(error: DBAPIError, bind: Connection | Engine, table: Table) -> Exception:
    """Return what to raise where the table could not be used: `error`, or one that says what to do."""
    engine = bind.engine
    try:
        missing = not inspect(engine).has_table(table.name, schema=table.schema)
    except Exception:
        return error
    if not missing:
        return error
    return InvalidSetting(
        f"Tasks have exactly_once, but the database {shown(engine.url)} has no table {table.fullname!r}, in which a "
        f"task is recorded as completed. Create it: {HOW_TO_CREATE}; in a hurry: {_ddl(engine, table)}"
    )


def _ddl(engine: Engine, table: Table) -> str:
    from sqlalchemy.schema import CreateIndex, CreateTable

    made: list[Any] = [CreateTable(table)]
    made += [CreateIndex(index) for index in sorted(table.indexes, key=lambda index: str(index.name))]
    return " ".join(" ".join(str(one.compile(dialect=engine.dialect)).split()) + ";" for one in made)


# -- keeping it short --------------------------------------------------------------------------------------------------

_PRUNED_AT_ONCE, _DELETED_AT_ONCE = 1000, 200


def forget(executor: Session | Connection, table: Table, task_id: str) -> int:
    """Delete the rows of `task_id`, so that it can run again; return how many there were."""
    found: Any = executor.execute(delete(table).where(table.c.task_id == task_id))
    return int(found.rowcount)


def prune(executor: Session | Connection, table: Table, older_than_s: float, most: int = _PRUNED_AT_ONCE) -> int:
    """Delete up to so many rows that are older, the oldest first; return how many there were.

    Rows that another transaction has locked are left to it.
    """
    old = table.c.completed_at < database_now() - bindparam("older", older_than_s)
    keys = select(table.c.task_id, table.c.nesting).where(old).order_by(table.c.completed_at).limit(most)
    if dialect_of(executor, table) == "postgresql":
        keys = keys.with_for_update(skip_locked=True)
    found = [tuple(row) for row in executor.execute(keys).all()]
    for start in range(0, len(found), _DELETED_AT_ONCE):
        part = found[start : start + _DELETED_AT_ONCE]
        executor.execute(delete(table).where(tuple_(table.c.task_id, table.c.nesting).in_(part)))
    return len(found)


def listed(
    executor: Session | Connection, table: Table, *, task_ids: Sequence[str] = (), task: str | None = None,
    limit: int = 100,
) -> list[Listed]:  # fmt: skip
    """Return rows, the newest first."""
    where: list[ColumnElement[bool]] = [table.c.nesting >= 0]
    if task_ids:
        where.append(table.c.task_id.in_(task_ids))
    if task is not None:
        where.append(table.c.task == task)
    columns = (table.c.task_id, table.c.nesting, table.c.task, table.c.completed_at)
    found = executor.execute(
        select(*columns, func.length(table.c.result), table.c.note)
        .where(*where)
        .order_by(table.c.completed_at.desc())
        .limit(limit)
    )
    return [Listed(*row) for row in found]
