"""PostgreSQL: psycopg, psycopg2 and pg8000."""

from __future__ import annotations

import operator
from typing import Any

from sqlalchemy.engine import URL, Dialect, Engine

from ..options import DatabaseOptions
from .base import CANCEL_TIMEOUT_S, Connect, Driver
from .keepalive import libpq_defaults
from .lost_clients import notice_lost_clients

CONNECT_TIMEOUT_S = 10
_IDLE = 0  # libpq's PQTRANS_IDLE
_ACTIVE = 1  # libpq's PQTRANS_ACTIVE


class _Libpq(Driver):
    """What psycopg and psycopg2 have in common."""

    cooperative = True
    failed_status = 3  # libpq's PQTRANS_INERROR

    def connect_args(self, url: URL, options: DatabaseOptions) -> dict[str, Any]:
        # libpq waits for ever by default, and a soft time limit is deferred during a connect.
        timeout = {} if "connect_timeout" in url.query else {"connect_timeout": CONNECT_TIMEOUT_S}
        return timeout | libpq_defaults(url)

    def listen(self, engine: Engine, options: DatabaseOptions) -> None:
        if not options.external_pooler:
            notice_lost_clients(engine)

    def is_executing(self, dbapi_connection: Any) -> bool:
        return dbapi_connection is not None and self.status_of(dbapi_connection) == _ACTIVE


class Psycopg(_Libpq):
    """psycopg 3."""

    # Written in C, like the other one: each task asks.
    status_of = operator.attrgetter("pgconn.transaction_status")

    def connect_args(self, url: URL, options: DatabaseOptions) -> dict[str, Any]:
        # A statement prepared on one connection of the server is unknown on the next, or has another's name.
        unprepared = {"prepare_threshold": None} if options.external_pooler else {}
        return super().connect_args(url, options) | unprepared

    def listen(self, engine: Engine, options: DatabaseOptions) -> None:
        super().listen(engine, options)
        self._spare_idle_rollbacks(engine.dialect)

    def _spare_idle_rollbacks(self, dialect: Dialect) -> None:
        """Let the connection pool roll back only what has a transaction: psycopg 3 does nothing else either, later.
        (psycopg2 has a state of its own beside the server's: after a COMMIT that was sent as a statement it must.)"""
        roll_back, status_of = dialect.do_rollback, self.status_of

        def do_rollback(connection: Any) -> None:
            if status_of(getattr(connection, "dbapi_connection", connection)) != _IDLE:
                roll_back(connection)

        dialect.do_rollback = do_rollback  # type: ignore[method-assign, assignment]

    def cancel(self, dbapi_connection: Any, connect: Connect) -> None:
        if self.is_executing(dbapi_connection):
            if hasattr(dbapi_connection, "cancel_safe"):
                dbapi_connection.cancel_safe(timeout=CANCEL_TIMEOUT_S)
            else:
                dbapi_connection.cancel()

    def make_cooperative(self, library: str) -> None:
        # psycopg chooses how to wait when it is imported: in C unless gevent had patched by then, and it does not know
        # eventlet. `wait` is looked up at each call, so a late change reaches every connection.
        import selectors

        from psycopg import waiting

        in_c = getattr(waiting, "wait_c", None)
        unfit = {in_c} if library == "gevent" else {in_c, waiting.wait_poll, getattr(waiting, "wait_epoll", None)}
        if waiting.wait in unfit:
            waiting.wait = waiting.wait_select
            # Connecting waits with a selector bound at import.
            waiting.DefaultSelector = selectors.DefaultSelector  # type: ignore[attr-defined]


class Psycopg2(_Libpq):
    """psycopg2."""

    status_of = operator.methodcaller("get_transaction_status")

    def cancel(self, dbapi_connection: Any, connect: Connect) -> None:
        if self.is_executing(dbapi_connection):
            dbapi_connection.cancel()

    def make_cooperative(self, library: str) -> None:
        from psycopg2 import extensions

        if extensions.get_wait_callback() is None:
            extensions.set_wait_callback(_gevent_wait if library == "gevent" else _eventlet_wait)


class Pg8000(Driver):
    """pg8000, which is written in Python."""

    cooperative = True

    # Tried on pg8000 1.31; without it a swallowed error is committed as a ROLLBACK, without a word.
    status_of = staticmethod(lambda dbapi_connection: getattr(dbapi_connection, "_transaction_status", None))
    failed_status = b"E"


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


DRIVERS: dict[str, Driver] = {"psycopg": Psycopg(), "psycopg2": Psycopg2(), "pg8000": Pg8000()}
