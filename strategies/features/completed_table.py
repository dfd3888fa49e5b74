"""The table of tasks that have completed: what its columns are, and which one an app has."""

from __future__ import annotations

import hashlib

from sqlalchemy import Column, Double, Index, Integer, MetaData, PrimaryKeyConstraint, String, Table, Text

from .declared_tables import DeclaredTables

TABLE = "celery_alchemy_completed"
LONGEST_ID = 255
HOW_TO_CREATE = "completed_tasks_table(Base.metadata), then Alembic or create_all()"


def recorded_id(task_id: str) -> str:
    """Return the id that the rows of a task have: its own, where the column can hold it, and tell it from others.

    MySQL and MariaDB compare without the spaces at the end; PostgreSQL keeps no NUL, and no database half a surrogate
    pair.
    """
    encoded = task_id.encode("utf-8", "surrogatepass")
    is_whole = task_id.isascii() or encoded.decode("utf-8", "ignore") == task_id
    if is_whole and len(task_id) <= LONGEST_ID and not task_id.endswith(" ") and "\0" not in task_id:
        return task_id
    return "sha256:" + hashlib.sha256(encoded).hexdigest()


def completed_tasks_table(metadata: MetaData, name: str = TABLE, *, schema: str | None = None) -> Table:
    """Return the table of tasks with `exactly_once` that have completed, as part of `metadata`: for `create_all`, and
    for Alembic to find.

    It is the one that is used where the process declares no other. `alchemy_completed_table` decides where it does.

    Args:
        metadata: Your own, for example `Base.metadata`.
        name: Another name, where you want one.
        schema: Its schema; left out, that of `metadata`.
    """
    return _tables.declare(metadata, name, schema)


def _made(metadata: MetaData, name: str, schema: str | None = None) -> Table:
    from sqlalchemy.dialects.mysql import LONGTEXT

    long = Text().with_variant(LONGTEXT(), "mysql", "mariadb")
    # Two ids that differ in case are two tasks; MySQL's usual collations would take them for one.
    exact = String(LONGEST_ID).with_variant(String(LONGEST_ID, collation="utf8mb4_bin"), "mysql", "mariadb")
    return Table(
        name,
        metadata,
        Column("task_id", exact, nullable=False),
        Column("nesting", Integer, nullable=False),
        Column("task", String(255), nullable=False),
        Column("completed_at", Double(), nullable=False),
        Column("content_type", String(100)),
        Column("result", long),
        Column("note", long),
        PrimaryKeyConstraint("task_id", "nesting", name=f"pk_{name}"[:60]),
        Index(f"ix_{name}_completed_at"[:60], "completed_at"),
        schema=schema,
    )


_tables = DeclaredTables(TABLE, _made, "Tasks have exactly_once", "alchemy_completed_table")


def chosen_completed_table(setting: str | None = None) -> Table:
    """Return the table that the completed tasks of an app are written into.

    Args:
        setting: `alchemy_completed_table`: its name, with its schema if it has one. None: the one that is declared.
    Raises:
        InvalidSetting: several are declared.
    """
    return _tables.chosen(setting)


def undeclared(setting: str | None = None) -> str | None:
    """Say, connecting to nothing, why the database may have no such table; None where the code declares it.

    Raises:
        InvalidSetting: several are declared, and the setting names none.
    """
    return _tables.undeclared(setting)
