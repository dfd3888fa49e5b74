"""SQLite, for trying things out: transactions that begin when SQLAlchemy says so, and wait their turn."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine

from ..engines import pool as connection_pool
from ..errors import CeleryAlchemyError

if TYPE_CHECKING:
    import sqlite3

    from ..engines.factory import EngineSource

BUSY_TIMEOUT_MS = 10_000


def in_memory(url: URL) -> bool:
    """Tell whether the database lives in its one connection."""
    return url.get_backend_name() == "sqlite" and url.database in {None, "", ":memory:"}


def listen(engine: Engine, source: EngineSource, reads: bool) -> None:
    """Make SQLite's transactions begin when SQLAlchemy says so, and wait their turn.

    A transaction that reads first and writes later fails at once with "database is locked" when another wrote in
    between, whatever the timeout. So the write lock is taken at the beginning: FOR UPDATE's part, which SQLite lacks.
    """
    lives_in_memory = in_memory(engine.url)
    options = source.options
    waits_ms = 0 if "timeout" in options.get("connect_args", {}) else BUSY_TIMEOUT_MS
    autocommit = str(options.get("isolation_level", "")).upper() == "AUTOCOMMIT" or reads

    def on_connect(dbapi_connection: sqlite3.Connection, record: object) -> None:
        dbapi_connection.isolation_level = None  # no implicit BEGIN: on_begin sends it
        cursor = dbapi_connection.cursor()
        if waits_ms:
            cursor.execute(f"PRAGMA busy_timeout = {waits_ms}")
        if not lives_in_memory:
            # Fails at once, whatever the timeout, while somebody writes; the mode stays in the file: the next one does.
            with contextlib.suppress(dbapi_connection.OperationalError):
                cursor.execute("PRAGMA journal_mode = WAL")
            cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.close()

    def on_begin(connection: Connection) -> None:
        pool = connection.engine.pool
        if lives_in_memory and getattr(connection.connection.dbapi_connection, "in_transaction", False):
            raise CeleryAlchemyError(
                "A SQLite database in memory lives in one connection, so a unit of work inside another cannot have a "
                "transaction of its own. Use a file, for example sqlite:////tmp/test.sqlite3."
            )
        nested = isinstance(pool, connection_pool.ReservedQueuePool) and len(pool.held()) > 1
        if waits_ms:
            # A nested unit of work cannot wait for the lock of the one around it: it may read, a write fails at once.
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {0 if nested else waits_ms}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if source.write_lock_at_begin and not nested else "BEGIN")

    event.listen(engine, "connect", on_connect)
    if not autocommit:
        event.listen(engine, "begin", on_begin)
