"""SQLite, for trying things out: transactions that begin when SQLAlchemy says so, and wait their turn."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.pool import ConnectionPoolEntry

from ..errors import CeleryAlchemyError
from ..options import DatabaseOptions
from ..scope import here
from .base import Driver

BUSY_TIMEOUT_MS = 10_000
#: Execution option of an Engine that serves tasks, which compete. A script or a test that calls tasks eagerly may write
#: in a nested unit of work while the outer one has only read.
_WRITE_LOCK_AT_BEGIN = "celery_alchemy_write_lock_at_begin"


def in_memory(url: URL) -> bool:
    """Tell whether the database lives in its one connection."""
    return url.get_backend_name() == "sqlite" and url.database in {None, "", ":memory:"}


class SQLite(Driver):
    """The standard library's sqlite3."""

    cooperative = False

    def serve_tasks(self, engine: Engine) -> None:
        engine.update_execution_options(**{_WRITE_LOCK_AT_BEGIN: True})

    def listen(self, engine: Engine, options: DatabaseOptions) -> None:
        """Make SQLite's transactions begin when SQLAlchemy says so, and wait their turn.

        A transaction that reads first and writes later fails at once with "database is locked" when another wrote in
        between, whatever the timeout. So the write lock is taken at the beginning: FOR UPDATE's part, which SQLite
        lacks.
        """
        lives_in_memory = in_memory(engine.url)
        given = options.engine_options
        waits_ms = 0 if "timeout" in given.get("connect_args", {}) else BUSY_TIMEOUT_MS
        autocommit = str(given.get("isolation_level", "")).upper() == "AUTOCOMMIT" or options.reads

        made: weakref.WeakSet[ConnectionPoolEntry] = weakref.WeakSet()

        def on_connect(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
            made.add(record)
            dbapi_connection.isolation_level = None  # no implicit BEGIN: on_begin sends it
            cursor = dbapi_connection.cursor()
            if waits_ms:
                cursor.execute(f"PRAGMA busy_timeout = {waits_ms}")
            if not lives_in_memory:
                # Fails at once, whatever the timeout, while another connection writes; the mode stays in the file, so
                # the next connection sets it.
                with contextlib.suppress(dbapi_connection.OperationalError):
                    cursor.execute("PRAGMA journal_mode = WAL")
                cursor.execute("PRAGMA synchronous = NORMAL")
            cursor.close()

        def on_begin(connection: Connection) -> None:
            if lives_in_memory and getattr(connection.connection.dbapi_connection, "in_transaction", False):
                raise CeleryAlchemyError(
                    "A SQLite database in memory lives in one connection, so a unit of work inside another cannot have "
                    "a transaction of its own. Use a file, for example sqlite:////tmp/test.sqlite3."
                )
            nested = sum(1 for record in here().held if record in made) > 1
            if waits_ms:
                # A nested unit of work cannot wait for the lock of the one around it: it may read, a write fails at
                # once.
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {0 if nested else waits_ms}")
            locks = connection.get_execution_options().get(_WRITE_LOCK_AT_BEGIN) and not nested
            connection.exec_driver_sql("BEGIN IMMEDIATE" if locks else "BEGIN")

        event.listen(engine, "connect", on_connect)
        if not autocommit:
            event.listen(engine, "begin", on_begin)


DRIVERS: dict[str, Driver] = {"pysqlite": SQLite()}
