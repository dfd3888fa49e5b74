"""What is in the outbox, and whether its table is the one that this version needs: for people who look."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Table, case, func, inspect, select
from sqlalchemy.exc import NoSuchTableError

from .outbox import Counts, count
from .outbox_table import HOW_TO_CREATE, database_now

MIGRATE = "Apply the migration of docs/outbox.md"


@dataclass(frozen=True, slots=True)
class State:
    """What is in the outbox now."""

    counts: Counts
    overdue_s: float
    """For so long a message has been due that no sender has taken, in seconds; 0.0 where there is none."""
    due_again: int
    """Messages that were sent, whose receivers have not ended, and that are due again."""
    error: str | None
    """Of the newest message that failed."""


def look(connection: Connection, table: Table) -> State:
    """Return what is in the outbox: three short statements."""
    again = case(((table.c.due_at <= database_now()) & (table.c.sends > 0), 1))
    overdue_s, due_again = connection.execute(
        select(database_now() - func.min(table.c.due_at), func.count(again)).select_from(table)
    ).one()
    failed = select(table.c.error).where(table.c.error.is_not(None)).order_by(table.c.id.desc()).limit(1)
    late_s = max(0.0, float(overdue_s or 0.0))
    return State(count(connection, table), late_s, int(due_again), connection.scalar(failed))


@dataclass(frozen=True, slots=True)
class Drift:
    """In what a table is not the one that this version needs."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy}."


def drift(connection: Connection, table: Table) -> Drift | None:
    """Return in what the database's table is not the one that this version needs; None where it is.

    Only columns and indexes that are missing count: what you have added is yours.
    """
    there = inspect(connection)
    try:
        columns = {column["name"] for column in there.get_columns(table.name, schema=table.schema)}
    except NoSuchTableError:
        return Drift(f"the database has no table {table.fullname!r}", f"Create it: {HOW_TO_CREATE}")
    missing = [column.name for column in table.columns if column.name not in columns]
    if missing:
        return Drift(
            f"the table {table.fullname!r} is not the one that this version needs: it has no {_some(missing)}", MIGRATE
        )
    indexed: list[list[str | None]] = [
        index["column_names"] for index in there.get_indexes(table.name, schema=table.schema)
    ]
    indexed += [[*one["column_names"]] for one in there.get_unique_constraints(table.name, schema=table.schema)]
    if not any(names[:1] == ["due_at"] for names in indexed):
        return Drift(
            f"the table {table.fullname!r} has no index that begins with 'due_at', so that each look of a sender reads "
            f"all of it",
            MIGRATE,
        )
    if ["batch", "position"] not in indexed:
        return Drift(
            f"the table {table.fullname!r} has no unique constraint on 'batch' and 'position', so that what becomes of "
            f"a transaction's messages cannot be recorded row by row",
            MIGRATE,
        )
    return None


def printable(text: str, most: int) -> str:
    """Return `text` as one line of up to so many characters that a terminal takes for text: whoever can write to the
    table decides what is in it."""
    line = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    return line if len(line) <= most else f"{line[:most]}..."


def _some(names: list[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} nor {quoted[-1]}"
