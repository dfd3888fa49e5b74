"""Statements that still run on the server when their task waits for them no longer."""

from __future__ import annotations

from sqlalchemy.orm import Session

from .._sqlalchemy import connections_of
from .._sqlalchemy_pools import creator_of
from ..drivers.base import driver_of


def cancel_running(session: Session) -> bool:
    """Cancel the statements of `session` that still run on the server; return whether there were any."""
    running = False
    for connection in connections_of(session):
        if connection.closed or connection.invalidated:
            continue
        driver, dbapi_connection = driver_of(connection.dialect), connection.connection.dbapi_connection
        if driver.is_executing(dbapi_connection):
            running = True
            driver.cancel_within_timeout(dbapi_connection, creator_of(connection.engine.pool))
    return running
