"""SQLite, for trying things out: transactions that begin when SQLAlchemy says so, and wait their turn."""

from __future__ import annotations

import contextlib
import operator
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Dialect, Engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from ..errors import CeleryAlchemyError
from ..interrupts import is_interrupt
from ..options import DatabaseOptions
from ..scope import here
from .base import Driver, Ended
from .texts import ROLLBACK, what_ends

BUSY_TIMEOUT_MS = 10_000
#: Key in the `info` of a connection: SQLAlchemy's transaction was begun on the server too.
_BEGAN = "celery_alchemy.began"
#: The same: it was ended since, and another one begun in its place.
_OVER = "over"
#: Key in the `info` of a connection: what its transaction has found.
_CHANGES = "celery_alchemy.changes"
_SAVEPOINTS = "celery_alchemy.savepoints"
_ENDED = Ended("it was rolled back, by a statement or by SQLite after an error that was caught,")
#: Execution option of an Engine that serves tasks, which compete. A script or a test that calls tasks eagerly may write
#: in a nested unit of work while the outer one has only read.
_WRITE_LOCK_AT_BEGIN = "celery_alchemy_write_lock_at_begin"


def in_memory(url: URL) -> bool:
    """Tell whether the database lives in its one connection."""
    return url.get_backend_name() == "sqlite" and url.database in {None, "", ":memory:"}


def is_private_memory(dbapi_connection: object) -> bool:
    """Tell whether `dbapi_connection` is one of sqlite3 with no file behind it: a fork copies the whole database."""
    sqlite3 = sys.modules.get("sqlite3")
    if sqlite3 is None or not isinstance(dbapi_connection, sqlite3.Connection):
        return False
    try:
        return not any(row[2] for row in dbapi_connection.execute("PRAGMA database_list"))
    except sqlite3.Error:  # of another thread, or closed
        return False


class SQLite(Driver):
    """The standard library's sqlite3."""

    cooperative: bool = False
    state_names: tuple[str, ...] = ("isolation_level", "in_transaction", "row_factory", "text_factory")
    state_of: Callable[[Any], Any] = operator.attrgetter(*state_names)

    def began(self, connection: PoolProxiedConnection) -> None:
        info, raw = _info_of(connection), connection.dbapi_connection
        info[_BEGAN] = getattr(raw, "in_transaction", False)
        info[_CHANGES] = _changes_of(raw)

    def what_ended(self, connection: PoolProxiedConnection) -> Ended | None:
        # SQLite rolls back by itself after some errors; what follows is committed statement by statement.
        began = _info_of(connection).get(_BEGAN)
        over = began == _OVER or (began and not getattr(connection.dbapi_connection, "in_transaction", True))
        return _ENDED if over else None

    def follow_statements(self, dialect: Dialect) -> None:
        """Begin again where a transaction was ended otherwise: what follows must not be committed by itself."""
        stock: Any = dialect

        if not dialect.is_async:
            close = stock.do_close

            def do_close(dbapi_connection: Any) -> None:
                let_go(dbapi_connection)
                close(dbapi_connection)

            stock.do_close = do_close

        def following(execute: Callable[..., None]) -> Callable[..., None]:
            def executing(cursor: Any, statement: str, *args: Any) -> None:
                context = args[-1] if args else None
                if context is None:
                    execute(cursor, statement, *args)
                    return
                if not cursor.connection.in_transaction and here().units:
                    _begin_again(context)  # a raw cursor has ended it
                try:
                    execute(cursor, statement, *args)
                except Exception:
                    _begin_again(context)
                    raise
                if not cursor.connection.in_transaction:
                    end = what_ends(statement)
                    # After a COMMIT, code without a unit of work may execute what works in no transaction (VACUUM).
                    if end == ROLLBACK or (end is not None and here().units):
                        _begin_again(context)

            return executing

        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            setattr(stock, name, following(getattr(stock, name)))
        savepoint, roll_back_to = stock.do_savepoint, stock.do_rollback_to_savepoint

        def do_savepoint(connection: Connection, name: str) -> None:
            savepoint(connection, name)
            info = _info_of(connection.connection)
            info.setdefault(_SAVEPOINTS, {})[name] = _changes_of(connection.connection.dbapi_connection)

        def do_rollback_to_savepoint(connection: Connection, name: str) -> None:
            """What was changed since, SQLite counts all the same."""
            roll_back_to(connection, name)
            info = _info_of(connection.connection)
            before = info.get(_SAVEPOINTS, {}).get(name)
            if before is not None and info.get(_CHANGES) == before:
                info[_CHANGES] = _changes_of(connection.connection.dbapi_connection)

        stock.do_savepoint, stock.do_rollback_to_savepoint = do_savepoint, do_rollback_to_savepoint

    def guard_commits(self, dialect: Any, refuse: Callable[[Ended], NoReturn]) -> None:
        super().guard_commits(dialect, refuse)

        def forgetting(end: Callable[[Any], None]) -> Callable[[Any], None]:
            def ended(connection: Any) -> None:
                end(connection)
                _info_of(connection).pop(_BEGAN, None)
                _info_of(connection).pop(_SAVEPOINTS, None)

            return ended

        dialect.do_commit, dialect.do_rollback = forgetting(dialect.do_commit), forgetting(dialect.do_rollback)

    def has_written(self, connection: Connection) -> bool | None:
        raw: Any = connection.connection.dbapi_connection
        before = _info_of(connection.connection).get(_CHANGES)
        return None if before is None else before != _changes_of(raw)

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        return getattr(dbapi_connection, "in_transaction", None)

    def left_on_reading(self, dbapi_connection: Any) -> str | None:
        writes = dbapi_connection.execute("PRAGMA query_only").fetchone() == (0,)
        return "PRAGMA query_only is off" if writes else None

    def same_state(self, dialect: Dialect, before: Any, after: Any) -> bool:
        # SQLAlchemy sets "" back; transactions begin when it says so either way.
        return before[1:] == after[1:] and {before[0], after[0]} == {None, ""}

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


def let_go(raw: Any, cursors: Iterable[Any] = ()) -> None:
    """Roll back what is open on a connection of sqlite3 that is about to be closed: while an exception, say, still has
    a cursor, SQLite keeps the locks after the close.

    Args:
        cursors: Those that may be in the middle of a statement. After `interrupt()` SQLite refuses a ROLLBACK until
            they are closed.
    """
    for cursor in cursors:
        with contextlib.suppress(Exception):
            cursor.close()
    with contextlib.suppress(Exception):  # of another thread, or closed
        raw.rollback()


def _info_of(connection: Any) -> dict[Any, Any]:
    try:
        found: dict[Any, Any] = connection.info
    except (AttributeError, NotImplementedError):  # SQLAlchemy's first look at a database has none
        return {}
    return found


def _changes_of(raw: Any) -> tuple[int, int] | None:
    """Return how many rows were changed on a connection so far, and the version of the tables; None: not known."""
    try:
        return raw.total_changes, raw.execute("PRAGMA schema_version").fetchone()[0]
    except Exception as error:
        if is_interrupt(error):
            raise
        return None


def _begin_again(context: Any) -> None:
    """Begin in place of the transaction of SQLAlchemy's where that is over. No COMMIT of it will be sent."""
    connection = context.root_connection.connection
    info, raw = _info_of(connection), connection.dbapi_connection
    if info.get(_BEGAN) and raw is not None and not raw.in_transaction:
        info[_BEGAN] = _OVER
        raw.execute("BEGIN")


DRIVERS: dict[str, Driver] = {"pysqlite": SQLite()}
