"""What a database server says of itself: its limits and timeouts, and whether a pooler stands before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import text
from sqlalchemy.engine import Connection, Engine

CONNECTED_S = 5


@dataclass(frozen=True, slots=True)
class Server:
    """A server, as one connection to it found it. Times in seconds; 0: none."""

    identity: str
    """The same for all databases of one server."""
    allowed: tuple[int | None, str]
    """The connections that this user may open, and the name of what says so."""
    pooler: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def ask(engine: Engine) -> Server:
    """Connect, and ask the server.

    Raises:
        sqlalchemy.exc.DBAPIError: it cannot be reached, or refuses.
    """
    with engine.connect() as connection:
        name = engine.dialect.name
        found = {"postgresql": _postgresql, "mysql": _mysql, "mariadb": _mysql}.get(name, _unknown)(connection)
        return Server(**found)


def _postgresql(connection: Connection) -> dict[str, Any]:
    one = connection.execute(
        text(
            "SELECT current_setting('max_connections')::int AS most,"
            " current_setting('superuser_reserved_connections')::int"
            " + coalesce(current_setting('reserved_connections', true)::int, 0) AS reserved,"
            " (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user) AS of_role,"
            " (SELECT datconnlimit FROM pg_database WHERE datname = current_database()) AS of_database,"
            " (SELECT pg_postmaster_start_time())::text AS started, pg_backend_pid() AS pid,"
            " current_setting('max_prepared_transactions')::int AS prepared,"
            " extract(epoch FROM current_setting('idle_in_transaction_session_timeout')::interval) AS idle,"
            " pg_is_in_recovery() AS replica"
        )
    ).one()
    limits = [(one.most - one.reserved, "max_connections")]
    limits += [(one.of_role, "the role's CONNECTION LIMIT")] if one.of_role >= 0 else []
    limits += [(one.of_database, "the database's CONNECTION LIMIT")] if one.of_database >= 0 else []
    # The driver was told a pid when it connected: a pooler's own, where there is one.
    raw: Any = connection.connection.driver_connection
    told = raw.get_server_pid() if connection.dialect.driver == "asyncpg" else _told_to_libpq(raw, one.pid)
    return {
        "identity": f"postgresql {one.started} {connection.engine.url.host}",
        "allowed": min(limits),
        "pooler": told != one.pid,
        "settings": {
            "max_prepared_transactions": one.prepared,
            "idle_in_transaction_session_timeout": float(one.idle),
            "is_replica": bool(one.replica),
        },
    }


def _told_to_libpq(raw: Any, otherwise: int) -> Any:
    return getattr(getattr(raw, "info", None), "backend_pid", otherwise)


def _mysql(connection: Connection) -> dict[str, Any]:
    one = connection.execute(
        text(
            "SELECT @@max_connections AS most, @@max_user_connections AS of_user, @@wait_timeout AS wait,"
            " @@hostname AS host, @@port AS port"
        )
    ).one()
    limits = [(int(one.most), "max_connections")]
    limits += [(int(one.of_user), "max_user_connections")] if one.of_user else []
    return {
        "identity": f"mysql {one.host}:{one.port}",
        "allowed": min(limits),
        "settings": {"wait_timeout": float(one.wait)},
    }


def _unknown(connection: Connection) -> dict[str, Any]:
    return {"identity": str(connection.engine.url.set(password=None)), "allowed": (None, "")}
