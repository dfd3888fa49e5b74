"""A statement that is sent once on each new connection."""

from __future__ import annotations

from typing import Any


def execute_at_connect(dbapi_connection: Any, statement: str) -> None:
    """Execute `statement` on a connection that SQLAlchemy does not know yet, and leave no transaction open."""
    # psycopg would begin a transaction for it. In PyMySQL `autocommit` is a method, and SET needs none.
    switches = isinstance(getattr(dbapi_connection, "autocommit", None), bool)
    before = dbapi_connection.autocommit if switches else None
    try:
        if switches:
            dbapi_connection.autocommit = True
        cursor = dbapi_connection.cursor()
        cursor.execute(statement)
        cursor.close()
        if switches:
            dbapi_connection.autocommit = before
    except BaseException:
        dbapi_connection.close()
        raise
