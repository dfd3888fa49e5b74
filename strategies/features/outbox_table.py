"""The outbox's table: what its columns are, which one an app has, and what it says where the database's is another."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.exc import CompileError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from .declared_tables import DeclaredTables

TABLE = "celery_alchemy_outbox"
LONGEST = 2**24 - 1
"""Bytes of a message, at most: what MySQL's MEDIUMTEXT holds."""
HOW_TO_CREATE = "outbox_table(Base.metadata), then Alembic or create_all()"


def outbox_table(metadata: MetaData, name: str = TABLE) -> Table:
    """Return the outbox's table, as part of `metadata`: for `create_all`, and for Alembic to find.

    It is the one that messages are written into, where the process declares no other. `alchemy_outbox_table` decides
    where it does.

    Args:
        metadata: Your own, for example `Base.metadata`; its schema is the table's.
        name: Another name, where you want one.
    """
    return _tables.declare(metadata, name)


def _made(metadata: MetaData, name: str, schema: str | None = None) -> Table:
    from sqlalchemy.dialects.mysql import LONGTEXT

    short = name.rpartition(".")[2]
    return Table(
        name,
        metadata,
        Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
        Column("batch", String(32), nullable=False),
        Column("position", Integer, nullable=False),
        Column("created_at", Double(), nullable=False),
        Column("due_at", Double()),
        Column("attempts", Integer, nullable=False, server_default="0"),
        Column("task_id", String(255), nullable=False),
        Column("task", String(255), nullable=False),
        Column("expires_at", Double()),
        Column("error", Text),
        Column("nesting", Integer),
        Column("sends", Integer, nullable=False, server_default="0"),
        # Not Text(LONGEST), which the server makes LONGTEXT of: Alembic would find another type in it each time.
        Column("message", Text().with_variant(LONGTEXT(), "mysql", "mariadb"), nullable=False),
        UniqueConstraint("batch", "position", name=f"uq_{short}_batch"[:60]),
        Index(f"ix_{short}_due_at"[:60], "due_at"),
        Index(f"ix_{short}_task_id"[:60], "task_id"),
        schema=schema,
    )


_tables = DeclaredTables(TABLE, _made, "alchemy_outbox is on", "alchemy_outbox_table")


def chosen_table(setting: str | None = None) -> Table:
    """Return the table that the messages of an app are written into.

    Args:
        setting: `alchemy_outbox_table`: its name, with its schema if it has one. None: the one that is declared.
    Raises:
        InvalidSetting: several are declared.
    """
    return _tables.chosen(setting)


def undeclared(setting: str | None = None) -> str | None:
    """Say, connecting to nothing, why the database may have no outbox; None where the code declares its table.

    Raises:
        InvalidSetting: several are declared, and the setting names none.
    """
    return _tables.undeclared(setting)


def missing_columns(found: set[str]) -> list[str]:
    """Return the columns that this version needs and a table with the columns `found` does not have."""
    return [column.name for column in chosen_columns() if column.name not in found]


def chosen_columns() -> list[Column[Any]]:
    """Return the columns of the table, as this version needs them."""
    return list(_made(MetaData(), TABLE).columns)


class database_now(FunctionElement[float]):  # noqa: N801 - used as a function is
    """Seconds since 1970 by the database's clock; the same all through a statement."""

    type: Any = Double()
    inherit_cache: bool = True


@compiles(database_now)
def _no_clock(element: database_now, compiler: Any, **keywords: Any) -> str:
    raise CompileError(
        f"The outbox does not know how to ask {compiler.dialect.name} for the time. It works on PostgreSQL, MySQL, "
        f"MariaDB and SQLite: leave alchemy_outbox out."
    )


@compiles(database_now, "postgresql")
def _postgresql(element: database_now, compiler: Any, **keywords: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM statement_timestamp()) AS DOUBLE PRECISION)"


@compiles(database_now, "mysql", "mariadb")
def _mysql(element: database_now, compiler: Any, **keywords: Any) -> str:
    # Not UNIX_TIMESTAMP(NOW(6)): in the hour that winter time repeats it means two moments.
    return "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) / 1000000e0)"


@compiles(database_now, "sqlite")
def _sqlite(element: database_now, compiler: Any, **keywords: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"
