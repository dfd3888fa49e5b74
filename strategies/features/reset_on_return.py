"""What a task leaves on the server's side of its connection does not reach the next one: `alchemy_reset_on_return`.

`SET ROLE`, `SET app.tenant`, `search_path`, temporary tables, advisory locks and so on stay as long as a connection.
When it comes back to the connection pool, its session is set back to what it was when the connection was new, what
`connect` listeners have set included. How, and in which round trip, the driver's module knows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Dialect, Engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, PoolResetState

from .._sqlalchemy_pools import commits_on_return, wrap_creator
from ..drivers.base import driver_of
from ..errors import InvalidSetting
from ..interrupts import is_interrupt
from ..options import DatabaseOptions
from ..scope import describe_current_scope, here

logger: logging.Logger = logging.getLogger(__name__)

#: Keys in `ConnectionPoolEntry.info`: what the new session was like; its reset has failed.
_NEW, _FAILED = "celery_alchemy.new_session", "celery_alchemy.reset_failed"


def why_not(dialect: Dialect | type[Dialect], options: DatabaseOptions) -> str | None:
    """Return why the sessions of a database cannot be reset; None where they can."""
    if options.external_pooler:
        return (
            "PgBouncer stands before it: the sessions are the pooler's, which gives them to other clients between two "
            "transactions. Set what a task needs for its transaction only (SET LOCAL), or look at PgBouncer's "
            "server_reset_query and server_reset_query_always"
        )
    if dialect.name == "sqlite":
        return "SQLite has no server that could keep anything"
    if driver_of(dialect).session_reset() is None:
        awaited = ", which is awaited (an `async def` task)" if dialect.is_async else ""
        return (
            f"it is not known how with the driver {dialect.driver}{awaited}; for ordinary tasks psycopg, psycopg2, "
            f"pymysql and mysqldb are known"
        )
    return None


def reset_on_return(engine: Engine, options: DatabaseOptions) -> None:
    """EngineHook: each connection of `engine` that comes back is reset, or closed where that fails.

    Raises:
        InvalidSetting: it cannot be done.
    """
    if not options.reset_on_return or isinstance(engine.pool, NullPool):
        return  # NullPool closes each connection, and the server forgets
    reason = why_not(engine.dialect, options)
    reset = driver_of(engine.dialect).session_reset()
    if reason is not None or reset is None:
        raise InvalidSetting(
            f"alchemy_reset_on_return=True, but the sessions of the database {options.database!r} cannot be reset: "
            f"{reason}. Leave it out."
        )
    dialect = engine.dialect

    def on_checkout(dbapi_connection: Any, record: ConnectionPoolEntry, fairy: object) -> None:
        if _NEW not in record.info:  # not at `connect`: the user's listeners may come after ours
            record.info[_NEW] = reset.remember(dbapi_connection, record)

    def on_reset(dbapi_connection: Any, record: ConnectionPoolEntry | None, state: PoolResetState) -> None:
        if record is None or state.terminate_only or _NEW not in record.info:
            return
        try:
            if not state.transaction_was_reset:
                if commits_on_return(engine.pool):
                    dialect.do_commit(dbapi_connection)
                elif not reset.rolls_back:
                    dialect.do_rollback(dbapi_connection)
            reset.reset(dbapi_connection, record.info[_NEW])
        except Exception as error:
            if is_interrupt(error):
                raise  # SQLAlchemy closes the connection
            record.info[_FAILED] = True
            first_line = str(error).partition("\n")[0]  # what follows may show values
            logger.warning(
                "%s: what it has left on its connection to the database %r cannot be reset (%s: %s). The connection is "
                "closed.", _who(), options.database, type(error).__name__, first_line,
            )  # fmt: skip

    def on_checkin(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        if record.info.pop(_FAILED, False):
            record.invalidate()

    wrap_creator(engine.pool, _noting(reset.made))
    reset.listen(engine)
    event.listen(engine, "checkout", on_checkout)
    event.listen(engine, "reset", on_reset)
    event.listen(engine, "checkin", on_checkin)


def _noting(
    made: Callable[[Any, ConnectionPoolEntry], None],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what wraps a creator, so that `made` sees each connection before any listener does."""

    def wrap(create: Callable[..., Any]) -> Callable[..., Any]:
        def creator(connection_record: ConnectionPoolEntry | None = None) -> Any:
            dbapi_connection = create(connection_record)
            if connection_record is not None:
                made(dbapi_connection, connection_record)
            return dbapi_connection

        return creator

    return wrap


def _who() -> str:
    """Name the unit of work that gives its connection back, for a message."""
    units = here().units
    return units[-1].unit.label if units else describe_current_scope()
