"""MySQL and MariaDB: PyMySQL and mysqlclient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from .._sqlalchemy import record_of, wrap_ends
from ..options import DatabaseOptions
from .along import Along
from .base import Connect, Converters, Driver, Ended
from .followed_mysql import follow
from .keepalive import keep_alive
from .reset_mysql import MySQLdbReset, PyMySQLReset
from .session_reset import SessionReset

_ER_OPTION_PREVENTS_STATEMENT = 1290
_ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION = 1792
_ER_READ_ONLY_MODE = 1836
IN_TRANSACTION = 1  # SERVER_STATUS_IN_TRANS
STATE = IN_TRANSACTION | 2  # SERVER_STATUS_AUTOCOMMIT
#: Key in `ConnectionPoolEntry.info`: since the checkout, a transaction was ended by COMMIT or ROLLBACK.
_ENDED = "celery_alchemy.ended"


class MySQLdb(Driver):
    """mysqlclient, which waits inside C."""

    cooperative: bool = False
    waits_in_c = True
    instead = "mysql+pymysql"

    state_names: tuple[str, ...] = (
        "autocommit",
        "cursorclass",
        "autocommit() was overwritten",
        "encoders",
        "converter",
    )
    state_of: Callable[[Any], Any] = staticmethod(
        lambda raw: (
            *(raw.get_autocommit(), raw.cursorclass, "autocommit" in raw.__dict__),
            *(Converters(raw.encoders.values()), Converters(raw.converter.values())),
        )
    )

    def follow(self, dbapi_connection: Any) -> None:
        follow(dbapi_connection)

    def began(self, connection: PoolProxiedConnection) -> None:
        raw: Any = connection.dbapi_connection
        raw.celery_alchemy_ended, raw.celery_alchemy_changed = None, False
        raw.celery_alchemy_unsure, raw.celery_alchemy_commits = False, 0

    def ended_by_code(self, connection: PoolProxiedConnection) -> bool:
        raw: Any = connection.dbapi_connection
        if raw is None:
            return False
        ended = getattr(raw, "celery_alchemy_ended", None)
        by_code = ended is not None and bool(ended.by_code)
        return by_code or bool(getattr(raw, "celery_alchemy_commits", 0) or raw.get_autocommit())

    def ended(self, dbapi_connection: Any) -> None:
        dbapi_connection.celery_alchemy_commits = 0
        dbapi_connection.celery_alchemy_ended = None
        dbapi_connection.celery_alchemy_unsure = False

    def has_written(self, connection: Connection) -> bool | None:
        return getattr(connection.connection.dbapi_connection, "celery_alchemy_changed", None)

    def left_on_reading(self, dbapi_connection: Any) -> str | None:
        found: str | None = getattr(dbapi_connection, "celery_alchemy_left", None)
        return found

    def what_ended(self, connection: PoolProxiedConnection) -> Ended | None:
        raw: Any = connection.dbapi_connection
        if getattr(raw, "celery_alchemy_unsure", False):
            raw.make_sure()
        return getattr(raw, "celery_alchemy_ended", None)

    def became_read_only(self, error: BaseException, dbapi_connection: Any, *, behind_pooler: bool) -> bool:
        number = self.code_of(error)
        if number == _ER_OPTION_PREVENTS_STATEMENT:
            return "read-only" in str(error).replace("_", "-")  # the message names the option: there are others
        if number == _ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION:
            return _begins_read_only(dbapi_connection)
        return number == _ER_READ_ONLY_MODE

    def commit_with(self, dialect: Dialect, dbapi_connection: Any, along: Along) -> bool:
        if not has_blocks(dialect):
            return False

        def commit() -> None:
            del dbapi_connection.commit  # the driver's own is in force again
            if not along.is_due():
                dbapi_connection.commit()
                return
            along.sent = True
            try:
                with closing(dbapi_connection.cursor()) as cursor:
                    cursor.execute(f"BEGIN NOT ATOMIC {along.query}; COMMIT; END", along.values)
            except Exception as error:
                along.failed(error)
                raise
            self.block_has_ended(dbapi_connection)

        dbapi_connection.commit = commit
        return True

    def block_has_ended(self, dbapi_connection: Any) -> None:
        """A compound statement of ours has ended the transaction."""

    def engine_arguments(self, options: DatabaseOptions) -> dict[str, Any]:
        # A reset rolls back too.
        spare = options.reset_on_return and "pool_reset_on_return" not in options.engine_options
        return {"pool_reset_on_return": None} if spare else {}

    def session_reset(self) -> SessionReset:
        return MySQLdbReset()

    def number_of(self, dbapi_connection: Any) -> int | None:
        # mysqlclient tells no other thread while it is executing.
        found: int | None = dbapi_connection.thread_id() if hasattr(dbapi_connection, "thread_id") else None
        return found

    def cancel(self, dbapi_connection: Any, connect: Connect) -> None:
        _kill_query(self.number_of(dbapi_connection), connect)

    def stop(self, dbapi_connection: Any, number: int | None, connect: Connect) -> bool:
        return _kill_query(number, connect, look=True)


class PyMySQL(MySQLdb):
    """PyMySQL, which is written in Python."""

    cooperative: bool = True
    state_names: tuple[str, ...] = (
        *("server_status (1: in a transaction, 2: autocommit)", "cursorclass"),
        *("autocommit() was overwritten", "encoders", "decoders"),
    )
    state_of: Callable[[Any], Any] = staticmethod(
        lambda raw: (
            *(raw.server_status & STATE, raw.cursorclass, "autocommit" in raw.__dict__),
            *(Converters(raw.encoders.values()), Converters(raw.decoders.values())),
        )
    )

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        status = getattr(dbapi_connection, "server_status", None)
        return bool(status & IN_TRANSACTION) if status is not None else None

    waits_in_c = False

    def keep_set_up(self, dbapi_connection: Any) -> None:
        if dbapi_connection.server_status & IN_TRANSACTION:
            dbapi_connection.commit()

    def looks_alone(self, dialect: Dialect) -> bool:
        return has_blocks(dialect)

    def look_alone(self, dialect: Dialect, connection: PoolProxiedConnection, query: str, values: Any) -> Any:
        # The ROLLBACK ends the snapshot that the SELECT has taken at REPEATABLE READ.
        with closing(connection.dbapi_connection.cursor()) as cursor:  # type: ignore[union-attr]
            cursor.execute(f"BEGIN NOT ATOMIC {query}; ROLLBACK; END", values)
            row = cursor.fetchone()
            cursor.nextset()
        connection.info[_ENDED] = True
        self.block_has_ended(connection.dbapi_connection)
        return row

    def engine_arguments(self, options: DatabaseOptions) -> dict[str, Any]:
        # A Session ends its transaction itself; the connection pool's own ROLLBACK would cost a second round trip.
        return {} if "pool_reset_on_return" in options.engine_options else {"pool_reset_on_return": None}

    def listen(self, engine: Engine, options: DatabaseOptions) -> None:
        keep_alive(engine)
        if options.reset_on_return:
            return
        if "pool_reset_on_return" not in options.engine_options and not options.reads:
            _spare_second_rollback(engine)

    def session_reset(self) -> SessionReset:
        return PyMySQLReset()


def has_blocks(dialect: Any) -> bool:
    """Tell whether several statements can be sent as one: a compound statement, which MariaDB executes outside of
    procedures too. In the mode for Oracle it is spelt otherwise."""
    return bool(getattr(dialect, "is_mariadb", False)) and "ORACLE" not in (getattr(dialect, "_sql_mode", "") or "")


def _begins_read_only(dbapi_connection: Any) -> bool:
    """Tell whether the transactions of this connection are read-only; if not, it is this one alone. A round trip."""
    cursor = dbapi_connection.cursor()
    try:
        # MySQL 8 knows the second name only, MariaDB before 11.1 the first.
        cursor.execute("SHOW SESSION VARIABLES WHERE Variable_name IN ('tx_read_only', 'transaction_read_only')")
        return any(row[1] in {"ON", "1"} for row in cursor.fetchall())
    finally:
        cursor.close()


def _kill_query(number: int | None, connect: Connect, *, look: bool = False) -> bool:
    """Stop what a connection executes; return whether it does: with `look` the server is asked, the driver does not
    say."""
    if number is None:
        return False
    other = connect()
    try:
        cursor = other.cursor()
        if look:
            cursor.execute("SELECT command FROM information_schema.processlist WHERE id = %s", (number,))
            if cursor.fetchone() in {None, ("Sleep",)}:
                return False
        cursor.execute(f"KILL QUERY {number}")
        cursor.close()
    finally:
        other.close()
    return True


def _spare_second_rollback(engine: Engine) -> None:
    """Let the connection pool send its ROLLBACK only where a transaction may be open: a Session has ended its own.

    The server's last answer says whether one is open, but an error is an answer that does not say so; so COMMIT and
    ROLLBACK are noted too. Whoever takes a raw connection ends nothing, and gets the pool's ROLLBACK.
    """

    def ended(connection: Any) -> None:
        record = record_of(connection)
        if record is not None:
            record.info[_ENDED] = True

    def on_checkout(dbapi_connection: object, record: ConnectionPoolEntry, fairy: object) -> None:
        record.info.pop(_ENDED, None)

    def on_reset(dbapi_connection: Any, record: ConnectionPoolEntry | None, state: object) -> None:
        is_open = getattr(dbapi_connection, "server_status", IN_TRANSACTION) & IN_TRANSACTION
        if is_open or record is None or not record.info.get(_ENDED):
            dbapi_connection.rollback()

    wrap_ends(engine.dialect, ended)
    event.listen(engine, "checkout", on_checkout)
    event.listen(engine, "reset", on_reset)


DRIVERS: dict[str, Driver] = {"pymysql": PyMySQL(), "mysqldb": MySQLdb()}
