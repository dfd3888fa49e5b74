"""The seam for drivers: what differs from one to another. One module a driver, imported when it is selected."""

from __future__ import annotations

import importlib
import logging
import os
import stat
import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import URL, Dialect, Engine

from ..options import DatabaseOptions

logger = logging.getLogger(__name__)

CANCEL_TIMEOUT_S = 2.0
#: The module of each driver that is known, below this package, by SQLAlchemy's name for it.
_MODULES = {
    "psycopg": "postgresql",
    "psycopg2": "postgresql",
    "pg8000": "postgresql",
    "pymysql": "mysql",
    "mysqldb": "mysql",
    "pysqlite": "sqlite",
}
#: Makes a new connection to the same server, outside the limits of the connection pool.
Connect = Callable[[], Any]


class Driver:
    """What the strategies know of a database driver. This one is of a driver that nobody has looked at.

    Each method takes the driver's own connection (`dbapi_connection`; None where a fork or an error has taken it away),
    and pays no round trip unless it says so.
    """

    cooperative: bool | None = None
    """Whether it lets other greenlets run while it waits; None: not known."""
    instead = "a driver written in Python"
    """What to use under gevent and eventlet where it does not."""

    def connect_args(self, url: URL, options: DatabaseOptions) -> dict[str, Any]:
        """Return the driver's arguments that tasks need; those of the user win."""
        return {}

    def engine_arguments(self, options: DatabaseOptions) -> dict[str, Any]:
        """Return the arguments of `create_engine` that tasks need; those of the user win."""
        return {}

    def listen(self, engine: Engine, options: DatabaseOptions) -> None:
        """Put the listeners on `engine` that tasks need with this driver."""

    def serve_tasks(self, engine: Engine) -> None:
        """Let `engine`, in a worker, serve tasks, which compete."""

    status_of: Callable[[Any], object] = staticmethod(lambda dbapi_connection: None)
    """Returns the state of the transaction as the driver knows it, whatever that looks like; pays no round trip."""
    failed_status: object = object()
    """That state where the server refuses everything but ROLLBACK: COMMIT would roll back and report success."""

    def transaction_failed(self, dbapi_connection: Any) -> bool:
        """Tell whether the server refuses everything but ROLLBACK."""
        return dbapi_connection is not None and self.status_of(dbapi_connection) == self.failed_status

    def is_executing(self, dbapi_connection: Any) -> bool:
        """Tell whether the driver is in the middle of a statement, as far as it says so."""
        return False

    def cancel(self, dbapi_connection: Any, connect: Connect) -> None:
        """Stop on the server what is executing. A round trip or more, and it may raise."""

    def cancel_within_timeout(self, dbapi_connection: Any, connect: Connect) -> None:
        """Do what `cancel` does. Never raises, and takes `CANCEL_TIMEOUT_S` seconds at most: a server that does not
        answer ends the statement by itself, only later."""

        def guarded() -> None:
            try:
                self.cancel(dbapi_connection, connect)
            except Exception as error:
                # The interruption itself is what the user must see.
                logger.info("Could not cancel the interrupted statement on the server: %s", error)

        thread = threading.Thread(target=guarded, name="celery-alchemy-cancel", daemon=True)
        thread.start()
        thread.join(CANCEL_TIMEOUT_S)

    def descriptor(self, dbapi_connection: Any) -> int | None:
        """Return the file descriptor of its socket; None when it shows none."""
        return socket_descriptor(dbapi_connection)

    def make_cooperative(self, library: str) -> None:
        """Let other greenlets of `library` (gevent, eventlet) run while the driver waits, where that can be done."""

    def code_of(self, error: BaseException) -> int | str | None:
        """Return MySQL's error number, or the SQLSTATE; None where the driver gives neither."""
        return code_of(error)

    def rolled_back(self, error: BaseException) -> bool:
        """Tell whether the server has undone the whole transaction because of `error`: the next statement would
        silently begin a new one, without what was written before."""
        return False


_unknown = Driver()
_drivers: dict[str, Driver] = {}


def driver_of(dialect: Dialect | type[Dialect]) -> Driver:
    """Return the Driver of `dialect`, its module imported now."""
    name = dialect.driver
    found = _drivers.get(name)
    if found is None:
        module = _MODULES.get(name)
        made: dict[str, Driver] = importlib.import_module(f".{module}", __package__).DRIVERS if module else {}
        found = _drivers[name] = made.get(name, _unknown)
    return found


def socket_descriptor(connection: object) -> int | None:
    """Return the file descriptor of a driver connection's socket; None when it has none (SQLite)."""
    for candidate in (connection, getattr(connection, "_sock", None), getattr(connection, "_usock", None)):
        fileno = getattr(candidate, "fileno", None)
        if fileno is None:
            continue
        try:
            descriptor = fileno()
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                return int(descriptor)
        except Exception:  # noqa: S112
            continue  # closed or not connected: nothing to cut
    return None


def code_of(error: BaseException) -> int | str | None:
    """Return the code that the error of any driver carries: MySQL's number, or the SQLSTATE; None where it has none."""
    first = error.args[0] if error.args else None
    if isinstance(first, int):
        return first
    sqlstate = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)  # psycopg, psycopg2
    if sqlstate is None and isinstance(first, dict):
        sqlstate = first.get("C")  # pg8000
    return sqlstate if isinstance(sqlstate, str) else None
