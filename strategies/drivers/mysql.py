"""MySQL and MariaDB: PyMySQL and mysqlclient."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.pool import ConnectionPoolEntry

from .._sqlalchemy import record_of, wrap_ends
from ..options import DatabaseOptions
from .base import Connect, Driver
from .keepalive import keep_alive

_ER_LOCK_DEADLOCK = 1213
_ER_XA_RBDEADLOCK = 1614
_SERVER_STATUS_IN_TRANS = 1
#: Key in `ConnectionPoolEntry.info`: since the checkout, a transaction was ended by COMMIT or ROLLBACK.
_ENDED = "celery_alchemy.ended"


class MySQLdb(Driver):
    """mysqlclient, which waits inside C."""

    cooperative = False
    instead = "mysql+pymysql"

    def rolled_back(self, error: BaseException) -> bool:
        # MySQL undoes all of a deadlock's victim, and its next statement begins a new transaction.
        return error.args[:1] in {(_ER_LOCK_DEADLOCK,), (_ER_XA_RBDEADLOCK,)}

    def cancel(self, dbapi_connection: Any, connect: Connect) -> None:
        thread_id = int(dbapi_connection.thread_id())
        other = connect()
        try:
            cursor = other.cursor()
            cursor.execute(f"KILL QUERY {thread_id}")
            cursor.close()
        finally:
            other.close()


class PyMySQL(MySQLdb):
    """PyMySQL, which is written in Python."""

    cooperative = True

    def engine_arguments(self, options: DatabaseOptions) -> dict[str, Any]:
        # A Session ends its transaction itself; the connection pool's own ROLLBACK would cost a second round trip.
        return {} if "pool_reset_on_return" in options.engine_options else {"pool_reset_on_return": None}

    def listen(self, engine: Engine, options: DatabaseOptions) -> None:
        keep_alive(engine)
        if "pool_reset_on_return" not in options.engine_options and not options.reads:
            _spare_second_rollback(engine)


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
        is_open = getattr(dbapi_connection, "server_status", _SERVER_STATUS_IN_TRANS) & _SERVER_STATUS_IN_TRANS
        if is_open or record is None or not record.info.get(_ENDED):
            dbapi_connection.rollback()

    wrap_ends(engine.dialect, ended)
    event.listen(engine, "checkout", on_checkout)
    event.listen(engine, "reset", on_reset)


DRIVERS: dict[str, Driver] = {"pymysql": PyMySQL(), "mysqldb": MySQLdb()}
