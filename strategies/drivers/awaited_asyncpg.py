"""asyncpg. It cancels a statement on the server itself.

It sends BEGIN where SQLAlchemy asks for it, and nothing after a COMMIT that was sent as text: what follows would be
committed statement by statement. And it knows that a transaction is open, not that the server refuses all but
ROLLBACK. So a transaction in which the server has refused a statement is asked about before its COMMIT.

Tried with asyncpg 0.32.0 and SQLAlchemy 2.1.9. Private of SQLAlchemy's adapted connection are `_transaction`, and
`_handle_exception`, through which each error of the driver goes. Private of asyncpg is `connect_utils.TLSUpgradeProto`:
where it is cancelled while it connects, asyncio logs "Future exception was never retrieved", about a future that none
waits for any more.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Dialect, Engine
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from .._sqlalchemy_pools import wrap_creator
from ..interrupts import is_interrupt
from ..options import DatabaseOptions
from .awaiting import Adapted, Awaited
from .base import Driver, Ended
from .keepalive import keep_alive
from .lost_clients import ask_for_checks, may_ask
from .postgresql import BY_STATEMENT, CONNECT_TIMEOUT_S, DEFAULT_READ_ONLY, HAS_WRITTEN, PostgreSQLDriver
from .texts import follow_texts, what_ends


class AdaptedAsyncpg(Adapted):
    """An adapted connection that keeps what becomes of its transaction."""

    _transaction: Any
    celery_alchemy_error: BaseException | None = None
    """What the server has refused in this transaction, last."""
    celery_alchemy_ended: Ended | None = None
    """Why the transaction that SQLAlchemy began is over; None where it is not, as far as is known."""

    @property
    def server_version(self) -> int:
        """The server's, as libpq has it: 180001."""
        version = self._connection.get_server_version()
        return int(version.major * 10_000 + version.minor)

    @property
    def in_transaction(self) -> bool:
        """A transaction is open on the server, whoever has begun it."""
        raw = self._connection
        return not raw.is_closed() and raw.is_in_transaction()

    def _handle_exception(self, error: Exception) -> Any:
        if self._transaction is not None:
            self.celery_alchemy_error = error
        super()._handle_exception(error)  # type: ignore[misc]


class Asyncpg(Awaited, PostgreSQLDriver):
    """asyncpg."""

    adapted: type[Adapted] = AdaptedAsyncpg
    cancels_itself = True
    state_names: tuple[str, ...] = ("isolation_level", "readonly", "deferrable", "a transaction is open")

    @staticmethod
    def state_of(raw: Any) -> Any:
        return raw.isolation_level, raw.readonly, raw.deferrable, raw.in_transaction

    def connect_args(self, url: URL, options: DatabaseOptions) -> dict[str, Any]:
        given: dict[str, Any] = {} if "timeout" in url.query else {"timeout": CONNECT_TIMEOUT_S}
        if options.external_pooler:
            # What was prepared on one connection of the server is unknown on the next, or has another's name.
            given |= {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
            given["prepared_statement_name_func"] = lambda: f"__celery_alchemy_{uuid.uuid4().hex}__"
        return given

    def engine_arguments(self, options: DatabaseOptions) -> dict[str, Any]:
        given = options.engine_options
        leave = "pool_reset_on_return" in given or {"poolclass", "pool"} & given.keys()
        return {} if leave else {"pool_reset_on_return": None}  # `settle` does it

    def follow_transactions(self, engine: Engine) -> None:
        super().follow_transactions(engine)
        dbapi: Any = engine.dialect.loaded_dbapi

        def wrap(create: Callable[..., Any]) -> Callable[..., Any]:
            def creator(connection_record: Any = None) -> Any:
                try:
                    return create(connection_record)
                except OSError as error:  # refused, timed out, no such host: no error of a driver for SQLAlchemy
                    raise dbapi.OperationalError(f"{type(error).__name__}: {error}", error) from error

            return creator

        wrap_creator(engine.pool, wrap)

    def listen(self, engine: Engine, options: DatabaseOptions) -> None:
        _retrieve_what_was_cancelled()
        keep_alive(engine)
        if options.external_pooler or not may_ask(engine):
            return

        def on_connect(dbapi_connection: Any, record: object) -> None:
            ask_for_checks(dbapi_connection, dbapi_connection.server_version, engine.dialect)

        event.listen(engine, "connect", on_connect)

    def is_lost(self, dbapi_connection: Any) -> bool:
        return bool(dbapi_connection.driver_connection.is_closed())

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        return dbapi_connection is not None and dbapi_connection.in_transaction

    def transaction_failed(self, dbapi_connection: Any) -> bool:
        """Tell whether the server refuses everything but ROLLBACK. A round trip, where it has refused something."""
        if getattr(dbapi_connection, "celery_alchemy_error", None) is None or not dbapi_connection.in_transaction:
            return False
        try:
            await_only(dbapi_connection.driver_connection.execute("SELECT 1"))
        except Exception as error:
            if is_interrupt(error):
                raise
            return True
        dbapi_connection.celery_alchemy_error = None  # there was a savepoint
        return False

    def began(self, connection: PoolProxiedConnection) -> None:
        self.ended(connection.dbapi_connection)

    def ended(self, dbapi_connection: Any) -> None:
        if dbapi_connection is not None:
            dbapi_connection.celery_alchemy_error = dbapi_connection.celery_alchemy_ended = None

    def what_ended(self, connection: PoolProxiedConnection) -> Ended | None:
        raw: Any = connection.dbapi_connection
        found = self._by_code(raw)
        if found is None and self.transaction_failed(raw):
            found = Ended(error=raw.celery_alchemy_error)
        return found

    def ended_by_code(self, connection: PoolProxiedConnection) -> bool:
        raw: Any = connection.dbapi_connection
        return self._by_code(raw) is not None or getattr(raw, "autocommit", False)

    def _by_code(self, raw: Any) -> Ended | None:
        if raw is None or self.is_lost(raw):
            return None
        found: Ended | None = getattr(raw, "celery_alchemy_ended", None)
        if found is None and raw._transaction is not None and not raw.in_transaction:
            found = BY_STATEMENT
        return found

    def follow_statements(self, dialect: Dialect) -> None:
        def executed(context: Any, statement: str, failed: bool) -> None:
            raw: Any = context.root_connection.connection.dbapi_connection
            if not failed and what_ends(statement) and raw._transaction is not None and not raw.in_transaction:
                raw.celery_alchemy_ended = BY_STATEMENT
                await_only(raw.driver_connection.execute("BEGIN"))  # what follows must not be committed by itself

        follow_texts(dialect, executed)

    def roll_back(self, dbapi_connection: Any) -> None:
        dbapi_connection.rollback()
        if dbapi_connection.in_transaction:  # one that SQLAlchemy knows nothing of
            await_only(dbapi_connection.driver_connection.execute("ROLLBACK"))
        self.ended(dbapi_connection)

    def keep_set_up(self, dbapi_connection: Any) -> None:
        if dbapi_connection.in_transaction:
            dbapi_connection.commit()

    def same_state(self, dialect: Dialect, before: Any, after: Any) -> bool:
        default = (getattr(dialect, "default_isolation_level", None) or "").replace(" ", "_").lower()
        levels = {before[0], after[0]}
        return levels <= {None, default, before[0]} and before[1:] == after[1:]

    def has_written(self, connection: Connection) -> bool | None:
        return bool(connection.exec_driver_sql(HAS_WRITTEN).scalar())

    def left_on_reading(self, dbapi_connection: Any) -> str | None:
        if dbapi_connection.in_transaction:
            return "a transaction is open"
        off = self.parameter(dbapi_connection, DEFAULT_READ_ONLY) == "off"
        return f"{DEFAULT_READ_ONLY} is off" if off else None

    def parameter(self, dbapi_connection: Any, name: str) -> str | None:
        found: str | None = getattr(dbapi_connection.driver_connection.get_settings(), name, None)
        return found

    def looks_alone(self, dialect: Dialect) -> bool:
        return True

    def look_alone(self, dialect: Dialect, connection: PoolProxiedConnection, query: str, values: Any) -> Any:
        raw: Any = connection.dbapi_connection
        try:
            return await_only(raw.driver_connection.fetchrow(query, *values))
        except Exception as error:
            return raw._handle_exception(error)  # raises it as one of the DB-API's

    def startup_options(self, dbapi_connection: Any) -> str:
        return ""  # it keeps none


def _retrieve_what_was_cancelled() -> None:
    """Let asyncio not log that an upgrade to TLS was lost: who waits for it, if any, is told by an exception."""
    from asyncpg import connect_utils

    upgrade: Any = getattr(connect_utils, "TLSUpgradeProto", None)
    lost = getattr(upgrade, "connection_lost", None)
    if lost is None or hasattr(lost, "celery_alchemy_retrieves"):
        return

    def connection_lost(self: Any, exc: Exception | None) -> None:
        lost(self, exc)
        if self.on_data.done() and not self.on_data.cancelled():
            self.on_data.exception()

    connection_lost.celery_alchemy_retrieves = True  # type: ignore[attr-defined]
    upgrade.connection_lost = connection_lost


DRIVERS: dict[str, Driver] = {"asyncpg": Asyncpg()}
