"""The seam for drivers: what differs from one to another. One module a driver, imported when it is selected."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

from sqlalchemy.engine import URL, Connection, Dialect, Engine
from sqlalchemy.pool import PoolProxiedConnection

from ..options import DatabaseOptions
from ..scope import here
from .along import Along
from .session_reset import SessionReset

logger: logging.Logger = logging.getLogger(__name__)

CANCEL_TIMEOUT_S = 2.0
#: The module of each driver that is known, below this package, by SQLAlchemy's name for it.
_MODULES = {
    "psycopg": "postgresql",
    "psycopg2": "libpq_psycopg2",
    "pg8000": "postgresql",
    "pymysql": "mysql",
    "mysqldb": "mysql",
    "pysqlite": "sqlite",
    "psycopg_async": "awaited_psycopg",
    "asyncpg": "awaited_asyncpg",
    "asyncmy": "awaited_mysql",
    "aiomysql": "awaited_mysql",
    "aiosqlite": "awaited_sqlite",
}
#: Makes a new connection to the same server, outside the limits of the connection pool.
Connect = Callable[[], Any]


class Ended(NamedTuple):
    """Why a transaction cannot be committed: it has failed, or it is over behind SQLAlchemy's back."""

    by_code: str = ""
    """What code has done to it; empty where the server has let it fail."""
    error: BaseException | None = None
    """What it failed with, where the driver knows."""


#: The server refuses everything but ROLLBACK, or has rolled back.
FAILED = Ended()


class Converters(tuple[Any, ...]):
    """The functions with which a connection converts values, for `state_of`. A message does not show them."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{len(self)} functions"


class Driver:
    """What the strategies know of a database driver. This one is of a driver that nobody has looked at.

    Each method takes the driver's own connection (`dbapi_connection`; None where a fork or an error has taken it away),
    and pays no round trip unless it says so.
    """

    cooperative: bool | None = None
    """Whether it lets other greenlets run while it waits; None: not known."""
    waits_in_c = False
    """It waits for the server inside C, where Python runs no signal handler, until the statement returns."""
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

    def follow(self, dbapi_connection: Any) -> None:
        """Let a new connection keep what `what_ended` asks for."""

    def leave_uncounted(self, dbapi_connection: Any) -> None:
        """Let a new connection count no transaction until it is settled, or its first one has ended."""

    def follow_transactions(self, engine: Engine) -> None:
        """The same for all connections that `engine` will make, where that must be said before."""

    def keep_set_up(self, dbapi_connection: Any) -> None:
        """Commit what listeners have begun on a new connection, and left open: what they have set is for all tasks, and
        must not go with the first one's ROLLBACK. A round trip where there is something."""
        if getattr(dbapi_connection, "in_transaction", False) is True:  # SQLite
            dbapi_connection.commit()

    def settle(self, dbapi_connection: Any) -> None:
        """Roll back what was left open on a connection that comes back, where the connection pool leaves that to us."""

    def began(self, connection: PoolProxiedConnection) -> None:
        """SQLAlchemy begins a transaction on `connection`; the driver may wait for its first statement."""

    def ended(self, dbapi_connection: Any) -> None:
        """SQLAlchemy has ended a transaction; what comes next may begin without it, on a raw connection."""

    def what_ended(self, connection: PoolProxiedConnection) -> Ended | None:
        """Return why the transaction that SQLAlchemy has begun on `connection` cannot be committed; None where it is
        still that one, and has not failed. Asked before each COMMIT."""
        return FAILED if self.transaction_failed(connection.dbapi_connection) else None

    def follow_statements(self, dialect: Any) -> None:
        """Let `dialect` notice statements that end a transaction, and let what follows not be committed by itself."""

    def guard_commits(self, dialect: Any, refuse: Callable[[Ended], NoReturn]) -> None:
        """Let `dialect` ask `what_ended` before each COMMIT, and count those that it sends, and those of code.

        Args:
            refuse: Raises the error for a transaction that cannot be committed.
        """
        begin, commit, roll_back = dialect.do_begin, dialect.do_commit, dialect.do_rollback

        def do_begin(connection: Any) -> None:
            begin(connection)
            self.began(connection)

        def do_commit(connection: Any) -> None:
            ended = self.what_ended(connection)
            if ended is not None:
                refuse(ended)
            try:
                commit(connection)
            finally:  # a COMMIT that fails has ended it too
                self.ended(getattr(connection, "dbapi_connection", connection))
            here().commits += 1

        def do_rollback(connection: Any) -> None:
            if hasattr(connection, "dbapi_connection") and self.ended_by_code(connection):
                here().ends += 1
            roll_back(connection)
            self.ended(getattr(connection, "dbapi_connection", connection))

        dialect.do_begin, dialect.do_commit, dialect.do_rollback = do_begin, do_commit, do_rollback

    def ended_by_code(self, connection: PoolProxiedConnection) -> bool:
        """Tell whether code has ended the transaction that SQLAlchemy is about to roll back, or has let each statement
        commit itself: then something may have been committed."""
        if connection.dbapi_connection is None:
            return False
        ended = self.what_ended(connection)
        return ended is not None and bool(ended.by_code)

    def has_written(self, connection: Connection) -> bool | None:
        """Tell whether the transaction of `connection` has changed anything; None where nobody can tell. A round
        trip."""
        return None

    state_of: Callable[[Any], object] | None = None
    """Returns a tuple of what code may have set on a driver's connection and the next user would meet: autocommit,
    isolation level, an open transaction. None: not known."""
    state_names: tuple[str, ...] = ()
    """What each of these is called."""

    def same_state(self, dialect: Dialect, before: Any, after: Any) -> bool:
        """Tell whether two states of a connection that are not equal mean the same."""
        return False

    def left_on_reading(self, dbapi_connection: Any) -> str | None:
        """Return what code has left on a connection of an Engine that only reads, and the next task would meet; None
        where there is nothing that the driver or the server's last answer tells, beside `state_of`. No round trip."""
        return None

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        """Tell whether a transaction is open, as far as the driver knows; None: it does not say. No round trip."""
        return None

    def is_executing(self, dbapi_connection: Any) -> bool:
        """Tell whether the driver is in the middle of a statement, as far as it says so."""
        return False

    def cancel(self, dbapi_connection: Any, connect: Connect) -> None:
        """Stop on the server what is executing. A round trip or more, and it may raise."""

    def number_of(self, dbapi_connection: Any) -> int | None:
        """Return by what the server knows the connection, for `stop`; None where that needs no number."""
        return None

    def stop(self, dbapi_connection: Any, number: int | None, connect: Connect) -> bool:
        """Stop what is executing, and tell whether there was anything; called from another thread than the one that
        waits for it. A round trip or more, and it may raise."""
        if not self.is_executing(dbapi_connection):
            return False
        self.cancel(dbapi_connection, connect)
        return True

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

    def begin_with(self, dbapi_connection: Any, along: Along) -> bool:
        """Send `along` together with the first statement of the transaction; False where the driver cannot. Where
        something else comes first, it is not sent."""
        return False

    def commit_with(self, dialect: Dialect, dbapi_connection: Any, along: Along) -> bool:
        """Send `along` together with the COMMIT; False where the driver cannot."""
        return False

    def looks_alone(self, dialect: Dialect) -> bool:
        """Tell whether `look_alone` works here."""
        return False

    def look_alone(self, dialect: Dialect, connection: PoolProxiedConnection, query: str, values: Any) -> Any:
        """Return the first row of a SELECT, None where it has none, and leave no transaction open. One round trip.

        Args:
            values: In the driver's own style.
        """
        raise NotImplementedError

    def session_reset(self) -> SessionReset | None:
        """Return what sets the server's part of a session back; None: not known how."""
        return None

    def stop_preparing(self, dbapi_connection: Any) -> None:
        """Use nothing any more that was prepared on this connection, where the driver prepares by itself."""

    def descriptor(self, dbapi_connection: Any) -> int | None:
        """Return the file descriptor of its socket; None when it shows none."""
        return socket_descriptor(dbapi_connection)

    def abandon(self, dbapi_connection: Any) -> None:
        """Close a connection whose event loop is closed, so that nothing can be awaited: the server sees its end."""
        found = socket_of(dbapi_connection)
        if found is not None:
            found.shutdown(socket.SHUT_RDWR)  # its descriptor is freed with the transport, which nothing keeps

    def look_of(self, dbapi_connection: Any, poll: Callable[[int], list[Any]] | None) -> Callable[[int], object] | None:
        """Return what looks, at a checkout, whether an idle connection may have been closed: a ping is to tell then.

        Args:
            poll: Looks whether there is something to read from its socket; None where the driver shows none.
        """
        return poll

    def make_cooperative(self, library: str) -> None:
        """Let other greenlets of `library` (gevent, eventlet) run while the driver waits, where that can be done."""

    def code_of(self, error: BaseException) -> int | str | None:
        """Return MySQL's error number, or the SQLSTATE; None where the driver gives neither."""
        return code_of(error)

    def became_read_only(self, error: BaseException, dbapi_connection: Any, *, behind_pooler: bool) -> bool:
        """Tell whether `error` says that the server takes no writes at present, though nothing of it was asked for.

        May pay a round trip.

        Args:
            behind_pooler: What the driver knows of the server may be of another one, or of another time.
        """
        return False


_unknown = Driver()
_drivers: dict[str, Driver] = {}


def driver_of(dialect: Dialect | type[Dialect]) -> Driver:
    """Return the Driver of `dialect`, its module imported now."""
    name = dialect.driver
    if name == "psycopg" and dialect.is_async:
        name = "psycopg_async"  # SQLAlchemy's name is the same for both
    found = _drivers.get(name)
    if found is None:
        module = _MODULES.get(name)
        made: dict[str, Driver] = importlib.import_module(f".{module}", __package__).DRIVERS if module else {}
        found = _drivers[name] = made.get(name, _unknown)
    return found


def socket_descriptor(connection: object) -> int | None:
    """Return the file descriptor of a driver connection's socket; None when it has none (SQLite)."""
    for candidate in _sockets_of(connection):
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


def socket_of(connection: object) -> Any:
    """Return the socket of a driver connection that is written in Python, its options to be set; None: not known."""
    return next((one for one in _sockets_of(connection) if hasattr(one, "setsockopt")), None)


def _sockets_of(connection: Any) -> Iterator[object]:
    """Yield what may be the socket of a driver connection, or knows its descriptor."""
    for one in (connection, getattr(connection, "driver_connection", None)):  # the second: SQLAlchemy's for asyncio
        yield one
        yield getattr(one, "_sock", None)  # PyMySQL
        yield getattr(one, "_usock", None)  # pg8000
        for transport in (getattr(one, "_transport", None), getattr(one, "_writer", None)):  # asyncpg; aiomysql
            ask = getattr(transport, "get_extra_info", None)
            yield ask("socket") if ask is not None else None


def code_of(error: BaseException) -> int | str | None:
    """Return the code that the error of any driver carries: MySQL's number, or the SQLSTATE; None where it has none."""
    first = error.args[0] if error.args else None
    if isinstance(first, int):
        return first
    sqlstate = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)  # psycopg, psycopg2
    if sqlstate is None and isinstance(first, dict):
        sqlstate = first.get("C")  # pg8000
    if sqlstate is None and hasattr(error.__cause__, "server_source_function"):
        sqlstate = getattr(error.__cause__, "sqlstate", None)  # asyncpg, where SQLAlchemy's own has lost it
    return sqlstate if isinstance(sqlstate, str) else None
