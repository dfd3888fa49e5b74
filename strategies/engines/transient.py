"""Which database errors pass by themselves: a fresh transaction, tried again, may well succeed.

Drivers say it with a code (SQLSTATE, MySQL's error number, SQLite's result code), never with a class of its own that
all share. So the Engine narrows the class of such an error, and `autoretry_for = (TransientDatabaseError,)` works
under every driver; whoever catches SQLAlchemy's own class still does.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import exc as sa_exc

from ..drivers import libpq_words
from ..drivers.base import code_of
from ..drivers.stale import is_stale
from ..errors import BrokenTransaction, TransientDatabaseError


class _FromMessage(Exception):
    """Can be made from its message alone: that is all that Celery's JSON results keep of an exception."""

    def __init__(self, statement: str | None = None, params: Any = None, orig: Any = None, *more: Any, **named: Any):
        if orig is None and not more and not named:
            sa_exc.StatementError.__init__(self, statement or "", None, None, None)  # type: ignore[arg-type]
        else:
            super().__init__(statement, params, orig, *more, **named)

    def __reduce__(self) -> Any:
        if getattr(self, "orig", None) is None:
            return type(self), self.args, {"detail": getattr(self, "detail", [])}
        return super().__reduce__()


class TransientOperationalError(_FromMessage, TransientDatabaseError, sa_exc.OperationalError):
    """An OperationalError that passes by itself."""


class TransientInterfaceError(_FromMessage, TransientDatabaseError, sa_exc.InterfaceError):
    """An InterfaceError that passes by itself: the connection is lost."""


class TransientInternalError(_FromMessage, TransientDatabaseError, sa_exc.InternalError):
    """An InternalError that passes by itself: the connection is lost, or the server has become read-only."""


class TransientNotSupportedError(_FromMessage, TransientDatabaseError, sa_exc.NotSupportedError):
    """A NotSupportedError that passes by itself: the server is a standby at present, or what was prepared is stale."""


class TransientProgrammingError(_FromMessage, TransientDatabaseError, sa_exc.ProgrammingError):
    """A ProgrammingError that passes by itself: what was prepared is gone; pg8000 calls all that the server says so."""


class TransientDriverError(_FromMessage, TransientDatabaseError, sa_exc.DatabaseError):
    """A DatabaseError of no narrower class that passes by itself: the connection is lost."""


class TransientDBAPIError(_FromMessage, TransientDatabaseError, sa_exc.DBAPIError):
    """A DBAPIError of no class that the DB-API knows, and that passes by itself: asyncpg has many."""


class TransientlyBrokenTransaction(TransientDatabaseError, BrokenTransaction):
    """A BrokenTransaction whose cause passes by itself."""


_NARROWED: dict[type[sa_exc.DBAPIError], type[TransientDatabaseError]] = {
    sa_exc.OperationalError: TransientOperationalError,
    sa_exc.InterfaceError: TransientInterfaceError,
    sa_exc.InternalError: TransientInternalError,
    sa_exc.NotSupportedError: TransientNotSupportedError,
    sa_exc.ProgrammingError: TransientProgrammingError,
    sa_exc.DatabaseError: TransientDriverError,
    sa_exc.DBAPIError: TransientDBAPIError,
}

#: SQLSTATE. Source: PostgreSQL, appendix A, "PostgreSQL Error Codes". Not among them: 57014, a statement's timeout,
#: which would only come again, and 57P04, the database is dropped.
_SQLSTATES = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "55P03",  # lock_not_available: NOWAIT, lock_timeout
        "53300",  # too_many_connections
        "57P01",  # admin_shutdown
        "57P02",  # crash_shutdown
        "57P03",  # cannot_connect_now
        "57P05",  # idle_session_timeout
        "25P03",  # idle_in_transaction_session_timeout
        "72000",  # snapshot_too_old
    }
)
_CONNECTION_EXCEPTION = "08"
_PROTOCOL_VIOLATION = "08P01"
"""The code of all that PgBouncer says itself, a wrong password included: only its words tell."""
_FOR_GOOD = ("28", "3D000", "57P04")
"""Refused, whatever becomes of the connection: who you are, which database; it was dropped."""

#: Source: MySQL 8.4 and MariaDB 11, "Error Reference". Not among them: 1317, somebody's KILL QUERY.
_MYSQL_NUMBERS = frozenset(
    {
        1020,  # ER_CHECKREAD: innodb_snapshot_isolation refuses a row that changed since
        1040,  # ER_CON_COUNT_ERROR: too many connections
        1053,  # ER_SERVER_SHUTDOWN
        1203,  # ER_TOO_MANY_USER_CONNECTIONS
        1205,  # ER_LOCK_WAIT_TIMEOUT
        1213,  # ER_LOCK_DEADLOCK
        1226,  # ER_USER_LIMIT_REACHED: max_user_connections
        1614,  # ER_XA_RBDEADLOCK
        1927,  # ER_CONNECTION_KILLED (MariaDB)
        3101,  # ER_TRANSACTION_ROLLBACK_DURING_COMMIT (group replication)
        3572,  # ER_LOCK_NOWAIT
        4031,  # ER_CLIENT_INTERACTION_TIMEOUT
        2002,  # CR_CONNECTION_ERROR: no such socket
        2003,  # CR_CONN_HOST_ERROR: refused, timed out
        2006,  # CR_SERVER_GONE_ERROR
        2013,  # CR_SERVER_LOST
        2055,  # CR_SERVER_LOST_EXTENDED
    }
)
_SQLITE_CODES = frozenset({5, 6})  # SQLITE_BUSY, SQLITE_LOCKED

#: Of these nobody knows what became of the statement.
_LOST_NUMBERS = frozenset({1053, 1927, 2002, 2003, 2006, 2013, 2055, 4031})
_LOST_STATES = ("08", "57P")

#: Of these the server rolls the transaction back because of another one: it may run again, and at once.
_CONFLICTS: frozenset[str | int] = frozenset({"40001", "40P01", 1020, 1213, 1614, 3101})


_LOCK_TIMEOUTS: frozenset[str | int] = frozenset({"55P03", 1205, 3572})


def is_transient(error: BaseException | None) -> bool:
    """Tell whether `error` passes by itself, so that a fresh transaction, tried again, may well succeed.

    Args:
        error: One of SQLAlchemy's, a driver's own, or ours; from any Engine.
    """
    if isinstance(error, TransientDatabaseError | sa_exc.TimeoutError):
        return True
    if isinstance(error, BrokenTransaction):
        return is_transient(error.__cause__)
    if isinstance(error, sa_exc.DBAPIError):
        said = _driver_says(error.orig, error.statement)
        return error.connection_invalidated if said is None else said
    return error is not None and not isinstance(error, sa_exc.SQLAlchemyError) and _driver_says(error) is True


def is_conflict(error: BaseException | None) -> bool:
    """Tell whether the server has rolled a transaction back because of another one: deadlock, serialization failure.

    Nothing of it is committed, which nobody knows of a connection that was lost in the COMMIT.
    """
    if isinstance(error, BrokenTransaction):
        return is_conflict(error.__cause__)
    if isinstance(error, sa_exc.DBAPIError):
        error = error.orig
    if error is None or not _is_drivers(error):
        return False
    return code_of(error) in _CONFLICTS or _sqlite_code_of(error) in _SQLITE_CODES


def is_lock_timeout(error: BaseException | None) -> bool:
    """Tell whether the server has ended a statement because it has waited too long for a lock of another
    transaction."""
    if isinstance(error, BrokenTransaction):
        return is_lock_timeout(error.__cause__)
    if isinstance(error, sa_exc.DBAPIError):
        error = error.orig
    return error is not None and _is_drivers(error) and code_of(error) in _LOCK_TIMEOUTS


def is_answer(error: BaseException | None) -> bool:
    """Tell whether the server has said `error`: of a connection that was lost, or of an interruption, nobody knows what
    the server has done."""
    if isinstance(error, TransientDatabaseError | sa_exc.DBAPIError) or error is None:
        original = getattr(error, "orig", None)
    else:
        original = error.__cause__.orig if isinstance(error.__cause__, sa_exc.DBAPIError) else None
    code = code_of(original) if original is not None else None
    return code is not None and code not in _LOST_NUMBERS and not str(code).startswith(_LOST_STATES)


def narrow(error: sa_exc.SQLAlchemyError | None, *, passes: bool) -> None:
    """Make `error` a TransientDatabaseError if it `passes` by itself.

    The same object, so that whatever SQLAlchemy still writes on it stays: only its class becomes a narrower one.
    """
    narrowed = _NARROWED.get(type(error))  # type: ignore[arg-type]
    if error is not None and narrowed is not None and passes:
        error.__class__ = narrowed  # type: ignore[assignment]


def driver_passes(error: BaseException, statement: str | None, *, disconnected: bool) -> bool:
    """Tell whether a driver's own `error` passes by itself.

    Args:
        statement: It was raised for; None: not known.
        disconnected: SQLAlchemy takes the connection for lost; believed where the driver does not say why.
    """
    said = _driver_says(error, statement)
    return disconnected if said is None else said


def _driver_says(error: BaseException | None, statement: str | None = None) -> bool | None:
    """Read the code of a driver's own error, whichever driver it is; None where that decides nothing."""
    if error is None or not _is_drivers(error):
        return None
    if is_stale(error, statement):
        return True
    code = code_of(error)
    if isinstance(code, int):
        return code in _MYSQL_NUMBERS or None
    if code == _PROTOCOL_VIOLATION:
        return libpq_words.server_passes(_message_of(error))
    if isinstance(code, str):
        if code.startswith(_FOR_GOOD):
            return False
        return code in _SQLSTATES or code.startswith(_CONNECTION_EXCEPTION) or None
    if (result_code := _sqlite_code_of(error)) is not None:
        return result_code in _SQLITE_CODES or None
    return libpq_words.network_passes(error.__cause__) or libpq_words.passes(str(error))


def _message_of(error: BaseException) -> str:
    first = error.args[0] if error.args else ""
    return str(first.get("M", "")) if isinstance(first, dict) else str(first)  # pg8000


def _sqlite_code_of(error: BaseException) -> int | None:
    result_code = getattr(error, "sqlite_errorcode", None)
    return result_code & 0xFF if isinstance(result_code, int) else None


def _is_drivers(error: BaseException) -> bool:
    """Tell whether `error` is of a database driver, whose classes have the names that the DB-API fixes. Where it has no
    name for one of asyncpg's, that has a SQLSTATE."""
    if hasattr(error, "sqlstate") and any(kind.__name__ == "Error" for kind in type(error).__mro__):
        return True
    return any(kind.__name__ in {"OperationalError", "InterfaceError", "DatabaseError"} for kind in type(error).__mro__)
