"""Statements that a connection has prepared, and that no longer fit what the server has.

A driver that prepares statements (psycopg after five executions, pg8000) keeps them as long as the connection lives.
A migration changes the type of a column, adds or drops one, or makes a type anew: PostgreSQL then refuses what is
prepared. `DEALLOCATE ALL`, `DISCARD ALL` or a pooler take it away. Each of these is refused before anything is done,
and on another connection the same statement works.
"""

from __future__ import annotations

import re
from typing import Any

from .base import code_of

#: SQLSTATE, and the function of the server that says so, a field of the protocol beside the message: the codes by
#: themselves stand for much else. Seen on PostgreSQL 15 and 18.
_SAYS_SO = frozenset(
    {
        ("0A000", "RevalidateCachedQuery"),  # cached plan must not change result type
        ("XX000", "getTypeInputInfo"),  # cache lookup failed for type: it was made anew, parameters have the old one
        ("XX000", "getTypeBinaryInputInfo"),
    }
)
_NOT_THERE, _THERE_ALREADY = "26000", "42P05"
#: Source: MariaDB 11 and MySQL 8.4, "Error Reference".
_ER_NEED_REPREPARE = 1615
#: The user's own prepared statements, by SQL: what is missing there is missing on every connection.
_BY_SQL = re.compile(r"\s*(?:PREPARE|EXECUTE|DEALLOCATE)\b", re.I)


def is_stale(error: BaseException, statement: str | None = None) -> bool:
    """Tell whether the driver's `error` says that something prepared on its connection does not fit any more.

    Args:
        statement: What was executed, where that is known.
    """
    code = code_of(error)
    if code == _ER_NEED_REPREPARE:
        return True
    if code in {_NOT_THERE, _THERE_ALREADY}:
        return _BY_SQL.match(statement or "") is None
    return (code, _function_of(error)) in _SAYS_SO


def _function_of(error: BaseException) -> str | None:
    """Return the function of the server that has raised `error`; None where the driver does not tell."""
    told: Any = getattr(getattr(error, "diag", None), "source_function", None)  # psycopg, psycopg2
    told = told or getattr(error.__cause__, "server_source_function", None)  # asyncpg, in SQLAlchemy's own
    first = error.args[0] if error.args else None
    return told or (first.get("R") if isinstance(first, dict) else None)  # pg8000
