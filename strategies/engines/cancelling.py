"""Statements that still run on the server when nobody waits for them any more."""

from __future__ import annotations

from sqlalchemy.orm import Session

from ..drivers.base import cancel_statement, is_executing
from ..sessions import connections_of


def cancel_running(session: Session) -> bool:
    """Cancel the statements of `session` that still run on the server; return whether there were any."""
    running = False
    for connection in connections_of(session):
        if connection.closed or connection.invalidated:
            continue
        dbapi_connection = connection.connection.dbapi_connection
        if is_executing(dbapi_connection):
            running = True
            cancel_statement(dbapi_connection, connection.engine)
    return running
