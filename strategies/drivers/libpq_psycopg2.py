"""PostgreSQL: psycopg2."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import closing
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Dialect, Engine
from sqlalchemy.pool import PoolProxiedConnection

from ..scope import here
from .along import Along
from .base import FAILED, Connect, Converters, Driver, Ended
from .postgresql import BY_STATEMENT, IDLE, IN_TRANSACTION, REFUSES, Libpq
from .reset_postgresql import Psycopg2Reset
from .session_reset import SessionReset
from .texts import ROLLBACK, follow_texts, what_ends

_FLAGS = operator.attrgetter("autocommit", "isolation_level", "readonly", "deferrable", "status", "cursor_factory")
_BEGUN = 2  # psycopg2's STATUS_BEGIN


class Psycopg2(Libpq):
    """psycopg2."""

    status_of: Callable[[Any], Any] = operator.methodcaller("get_transaction_status")
    state_names: tuple[str, ...] = (
        *("autocommit", "isolation_level", "readonly", "deferrable", "status", "cursor_factory"),
        *("typecasters", "typecasters of binary values"),
    )

    @staticmethod
    def state_of(dbapi_connection: Any) -> object:
        """Return the driver's flags, and the types that were registered with this connection."""
        text, binary = dbapi_connection.string_types, dbapi_connection.binary_types
        return (*_FLAGS(dbapi_connection), Converters(text.items()), Converters(binary.items()) if binary else ())

    def follow_transactions(self, engine: Engine) -> None:
        from .followed_psycopg2 import FollowedConnection

        def on_connect(dialect: Dialect, record: object, arguments: Any, keywords: dict[str, Any]) -> None:
            keywords.setdefault("connection_factory", FollowedConnection)

        event.listen(engine, "do_connect", on_connect)

    def began(self, connection: PoolProxiedConnection) -> None:
        raw: Any = connection.dbapi_connection
        if hasattr(raw, "celery_alchemy_ends"):  # else it is of a class of the user's
            raw.celery_alchemy_ends = 0

    def keep_set_up(self, dbapi_connection: Any) -> None:
        if dbapi_connection.status == _BEGUN:
            dbapi_connection.commit()

    def follow_statements(self, dialect: Dialect) -> None:
        def executed(context: Any, statement: str, failed: bool) -> None:
            raw: Any = context.root_connection.connection.dbapi_connection
            end = what_ends(statement)
            if end is None or raw.autocommit:
                return
            status = raw.get_transaction_status()
            if status == IN_TRANSACTION and not failed and hasattr(raw, "celery_alchemy_ends"):
                raw.celery_alchemy_ends += 1
            # After a COMMIT, code without a unit of work may execute what works in no transaction (CREATE DATABASE).
            elif status == IDLE and raw.status == _BEGUN and (end == ROLLBACK or here().units):
                raw.rollback()  # the driver believes in a transaction: each statement would be committed by itself

        follow_texts(dialect, executed)
        from psycopg2 import extensions

        status_of: Any = extensions.connection.status.__get__
        execute, execute_many = dialect.do_execute, dialect.do_executemany

        def looked_at(cursor: Any) -> None:
            raw = cursor.connection
            if status_of(raw) == _BEGUN and raw.get_transaction_status() == IDLE and here().units:
                raw.rollback()  # a raw cursor has ended it

        def do_execute(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
            looked_at(cursor)
            execute(cursor, statement, parameters, context)

        def do_executemany(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
            looked_at(cursor)
            execute_many(cursor, statement, parameters, context)

        dialect.do_execute, dialect.do_executemany = do_execute, do_executemany  # type: ignore[method-assign]

    def ended_by_code(self, connection: PoolProxiedConnection) -> bool:
        raw: Any = connection.dbapi_connection
        return raw is not None and (_ends_of(raw) > 0 or _is_over(raw) or raw.autocommit is True)

    def ended(self, dbapi_connection: Any) -> None:
        if hasattr(dbapi_connection, "celery_alchemy_ends"):
            dbapi_connection.celery_alchemy_ends = 0

    def what_ended(self, connection: PoolProxiedConnection) -> Ended | None:
        raw: Any = connection.dbapi_connection
        if raw is None:
            return None
        status = raw.get_transaction_status()
        if status == REFUSES:
            return FAILED
        return BY_STATEMENT if _is_over(raw) or _ends_of(raw) > 0 else None

    def begin_with(self, dbapi_connection: Any, along: Along) -> bool:
        take = getattr(dbapi_connection, "celery_alchemy_begin_with", None)
        return take is not None and bool(take(along))

    def looks_alone(self, dialect: Dialect) -> bool:
        return True

    def look_alone(self, dialect: Dialect, connection: PoolProxiedConnection, query: str, values: Any) -> Any:
        raw: Any = connection.dbapi_connection
        raw.autocommit = True
        try:
            with closing(raw.cursor()) as cursor:
                cursor.execute(query, values)
                return cursor.fetchone()
        finally:
            if not raw.closed:
                raw.autocommit = False

    def commit_with(self, dialect: Dialect, dbapi_connection: Any, along: Along) -> bool:
        take = getattr(dbapi_connection, "celery_alchemy_commit_with", None)
        return take is not None and bool(take(along))

    def session_reset(self) -> SessionReset:
        return Psycopg2Reset()

    waits_in_c = True

    def cancel(self, dbapi_connection: Any, connect: Connect) -> None:
        if self.is_executing(dbapi_connection):
            dbapi_connection.cancel()

    def make_cooperative(self, library: str) -> None:
        from psycopg2 import extensions

        if extensions.get_wait_callback() is None:
            extensions.set_wait_callback(_gevent_wait if library == "gevent" else _eventlet_wait)


def _ends_of(raw: Any) -> int:
    """Return how often code has ended the transaction; 0 where the connection is of a class of the user's."""
    ends: int = getattr(raw, "celery_alchemy_ends", 0)
    return ends


def _is_over(raw: Any) -> bool:
    """Tell whether psycopg2 believes in a transaction that the server does not know; in autocommit it knows of none."""
    over: bool = raw.get_transaction_status() == IDLE and not raw.autocommit and raw.status == _BEGUN
    return over


def _gevent_wait(connection: Any, timeout: float | None = None) -> None:
    from gevent.socket import wait_read, wait_write
    from psycopg2 import extensions

    while True:
        state = connection.poll()
        if state == extensions.POLL_OK:
            return
        if state == extensions.POLL_READ:
            wait_read(connection.fileno(), timeout=timeout)
        elif state == extensions.POLL_WRITE:
            wait_write(connection.fileno(), timeout=timeout)
        else:
            raise extensions.psycopg2.OperationalError(f"unexpected answer of poll(): {state}")


def _eventlet_wait(connection: Any, timeout: float = -1) -> None:
    from eventlet.hubs import trampoline
    from psycopg2 import extensions

    while True:
        state = connection.poll()
        if state == extensions.POLL_OK:
            return
        if state == extensions.POLL_READ:
            trampoline(connection.fileno(), read=True)
        elif state == extensions.POLL_WRITE:
            trampoline(connection.fileno(), write=True)
        else:
            raise extensions.psycopg2.OperationalError(f"unexpected answer of poll(): {state}")


DRIVERS: dict[str, Driver] = {"psycopg2": Psycopg2()}
