"""Let PostgreSQL notice within a second that its client is gone.

A pool process that is killed in the middle of a query (hard time limit, `revoke(terminate=True)`, the out-of-memory
killer) leaves that query to the server, which goes on with it, and holds the row locks of the transaction, until it has
something to send. Since PostgreSQL 14 it looks at the socket meanwhile, if it is told to.
"""

from __future__ import annotations

import contextlib
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Dialect, Engine
from sqlalchemy.pool import NullPool

CHECK_INTERVAL_MS = 1000
_PARAMETER = "client_connection_check_interval"
_SINCE = 140000
# Nothing where somebody has set it on the server (postgresql.conf, ALTER ROLE), and no error where nobody knows it.
_ASK_FOR_CHECKS = (
    f"SELECT set_config('{_PARAMETER}', '{CHECK_INTERVAL_MS}', false) WHERE current_setting('{_PARAMETER}', true) = '0'"
)


def notice_lost_clients(engine: Engine) -> None:
    """Let each connection of `engine`, on PostgreSQL 14 and newer, ask for a look at its socket once a second.

    One round trip per connection made, none per task. Not as a start-up parameter (`options=-c ...`), which PgBouncer
    and older servers refuse. A connection pool that connects for each task (NullPool) is left alone.
    """
    if not may_ask(engine):
        return

    def on_connect(connection: Any, record: object) -> None:
        # What the user says wins, be it in the URL, in connect_args or in PGOPTIONS: libpq knows.
        if _PARAMETER not in (connection.info.options or ""):
            ask_for_checks(connection, connection.info.server_version, engine.dialect)

    event.listen(engine, "connect", on_connect)


def may_ask(engine: Engine) -> bool:
    """Tell whether `engine` keeps its connections, so that a round trip for each is worth it."""
    return not isinstance(engine.pool, NullPool)


def ask_for_checks(connection: Any, version: int, dialect: Dialect) -> None:
    """Ask the server to look at the socket of `connection`, a driver's. Its `version` is 180001, for example."""
    if version < _SINCE:
        return
    autocommit, connection.autocommit = connection.autocommit, True
    cursor = connection.cursor()
    try:
        # Refused on platforms that cannot look, and by what only resembles PostgreSQL: all works without.
        with contextlib.suppress(dialect.loaded_dbapi.Error):
            cursor.execute(_ASK_FOR_CHECKS)
        cursor.close()
        connection.autocommit = autocommit
    except BaseException:
        # Killed in between: the driver is in the middle of an answer, and SQLAlchemy does not know this connection yet.
        connection.close()
        raise
