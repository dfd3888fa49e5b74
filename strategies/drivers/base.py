"""What differs from driver to driver: installed or not, sync or async, cancelling, transaction status."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import URL, Dialect, Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from ..errors import InvalidSetting

logger = logging.getLogger(__name__)

#: The driver to name in a message instead of an async one.
_SYNC = {
    "asyncpg": "psycopg",
    "psycopg_async": "psycopg",
    "aiomysql": "pymysql",
    "asyncmy": "pymysql",
    "aiosqlite": "pysqlite",
    "aioodbc": "pyodbc",
    "oracledb_async": "oracledb",
}
_INSTALL = {
    "psycopg": "pip install 'celery-alchemy[postgresql]'",
    "pymysql": "pip install 'celery-alchemy[mysql]'",
    "psycopg2": "pip install psycopg2-binary",
    "mysqldb": "pip install mysqlclient",
}
CANCEL_TIMEOUT_S = 2.0
_IN_ERROR = 3  # libpq's PQTRANS_INERROR
_ER_LOCK_DEADLOCK = 1213
_ER_XA_RBDEADLOCK = 1614
_ACTIVE = 1  # libpq's PQTRANS_ACTIVE


def shown(url: URL) -> str:
    """Return `url` for a message: no user, no password, no query, and nothing that could be half a password."""
    place = f"{url.host or ''}{f':{url.port}' if url.port else ''}/{url.database or ''}"
    return f"{url.drivername}://{'...' if '@' in place or '%' in place else place}"


def parse_url(value: str | URL, setting: str) -> URL:
    """Return the URL in `value`, checked: SQLAlchemy can parse it, its driver is installed and is not async.

    Connects to nothing. Raises:
        InvalidSetting: names `setting` and the remedy; the message holds no password, not even a part of a broken URL.
    """
    try:
        url = make_url(value)
    except (ArgumentError, ValueError, TypeError):
        # The text of a URL that cannot be parsed may be a password; SQLAlchemy's own message would repeat it.
        raise InvalidSetting(
            f"{setting} is not a URL that SQLAlchemy can parse (its text is not shown, for it may hold a password). "
            f"Write it as dialect+driver://user:password@host/database, special characters in the password "
            f"percent-encoded, for example postgresql+psycopg://shop@localhost/shop."
        ) from None
    try:
        dialect = url.get_dialect()
    except NoSuchModuleError:
        raise InvalidSetting(
            f"{setting}={shown(url)!r}: SQLAlchemy knows no dialect {url.drivername!r}. Known to work here: "
            f"postgresql+psycopg, postgresql+psycopg2, mysql+pymysql, mysql+mysqldb, sqlite."
        ) from None
    if dialect.is_async:
        sync = url.set(drivername=f"{url.get_backend_name()}+{_SYNC.get(url.get_driver_name(), 'DRIVER')}")
        raise InvalidSetting(
            f"{setting}={shown(url)!r} names the async driver {dialect.driver!r}, but Celery tasks are ordinary "
            f"functions. Use {shown(sync)!r}."
        )
    try:
        dialect.import_dbapi()
    except ImportError as error:
        install = _INSTALL.get(dialect.driver, f"install the package that provides it ({error.name or dialect.driver})")
        raise InvalidSetting(
            f"{setting}={shown(url)!r} needs the driver {dialect.driver!r}, which cannot be imported ({error}). "
            f"Remedy: {install}."
        ) from error
    return _password_in_its_place(url)


def _password_in_its_place(url: URL) -> URL:
    """Return `url` with a password that stands in its query where SQLAlchemy's `repr` masks it."""
    for name in ("password", "passwd"):
        value = url.query.get(name)
        if isinstance(value, str):
            url = url.difference_update_query([name]).set(password=url.password or value)
    return url


def transaction_failed(dbapi_connection: Any) -> bool:
    """Tell whether the server refuses everything but ROLLBACK (PostgreSQL after an error); COMMIT would roll back and
    report success. No round trip."""
    pgconn = getattr(dbapi_connection, "pgconn", None)  # psycopg, and every task ends here: no detours
    if pgconn is not None:
        return bool(pgconn.transaction_status == _IN_ERROR)
    status = _libpq_status(dbapi_connection)
    if status is not None:
        return status == _IN_ERROR
    return getattr(dbapi_connection, "_transaction_status", None) == b"E"  # pg8000


def server_rolled_back(dialect: Dialect, error: BaseException) -> bool:
    """Tell whether the server has undone the whole transaction because of `error` (MySQL's deadlock victim). The next
    statement would silently begin a new one, without what was written before."""
    return dialect.name in {"mysql", "mariadb"} and error.args[:1] in {(_ER_LOCK_DEADLOCK,), (_ER_XA_RBDEADLOCK,)}


def is_executing(dbapi_connection: Any) -> bool:
    """Tell whether the driver is in the middle of a statement, as far as it says so (libpq). No round trip."""
    return _libpq_status(dbapi_connection) == _ACTIVE


def _libpq_status(dbapi_connection: Any) -> int | None:
    pgconn = getattr(dbapi_connection, "pgconn", None)  # psycopg
    if pgconn is not None:
        return int(pgconn.transaction_status)
    ask = getattr(dbapi_connection, "get_transaction_status", None)  # psycopg2
    return int(ask()) if ask is not None else None


def cancel_statement(dbapi_connection: Any, engine: Engine) -> None:
    """Stop on the server what `dbapi_connection` is executing, so that it holds its locks no longer.

    psycopg and psycopg2 send a cancel request; PyMySQL and mysqlclient a `KILL QUERY` over a connection of its own.
    Never raises, and takes `CANCEL_TIMEOUT_S` seconds at most: whoever does not answer is left to the server.
    """
    if engine.dialect.name in {"mysql", "mariadb"} or is_executing(dbapi_connection):
        _within_timeout(lambda: cancel(dbapi_connection, engine))


def cancel(dbapi_connection: Any, engine: Engine) -> None:
    """Do what `cancel_statement` does, here and now: it may wait, and it may raise."""
    if engine.dialect.name == "postgresql":
        if is_executing(dbapi_connection):
            _cancel_libpq(dbapi_connection)
    elif engine.dialect.name in {"mysql", "mariadb"}:
        _kill_query(dbapi_connection, engine)


def _cancel_libpq(dbapi_connection: Any) -> None:
    if hasattr(dbapi_connection, "cancel_safe"):
        dbapi_connection.cancel_safe(timeout=CANCEL_TIMEOUT_S)
    else:
        dbapi_connection.cancel()


def _kill_query(dbapi_connection: Any, engine: Engine) -> None:
    thread_id = int(dbapi_connection.thread_id())
    # Connects as this Engine does, the user's connect_args, creator and listeners included; outside its pool.
    other: Any = engine.pool._invoke_creator(None)  # type: ignore[arg-type]
    try:
        cursor = other.cursor()
        cursor.execute(f"KILL QUERY {thread_id}")
        cursor.close()
    finally:
        other.close()


def _within_timeout(work: Callable[[], None]) -> None:
    def guarded() -> None:
        try:
            work()
        except Exception as error:
            # The interruption itself is what the user must see; the server ends the statement by itself, only later.
            logger.info("Could not cancel the interrupted statement on the server: %s", error)

    thread = threading.Thread(target=guarded, name="celery-alchemy-cancel", daemon=True)
    thread.start()
    thread.join(CANCEL_TIMEOUT_S)


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
