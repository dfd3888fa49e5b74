"""A limit that the server sets to each statement, on every connection that an Engine makes."""

from __future__ import annotations

import math
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Dialect, Engine

from ..options import DatabaseOptions
from .at_connect import execute_at_connect

#: Sent once for each connection, by dialect; MariaDB's and MySQL's differ in name, unit, and in what they stop.
_POSTGRESQL = "SET SESSION statement_timeout = {ms}"
_MARIADB = "SET SESSION max_statement_time = {s}"
_MYSQL = "SET SESSION max_execution_time = {ms}"  # SELECT only
SUPPORTED = ("postgresql", "mysql", "mariadb")


def supports(dialect: type[Dialect]) -> bool:
    """Tell whether the servers of this dialect can stop a statement by themselves."""
    return dialect.name in SUPPORTED


def milliseconds(seconds: float) -> int:
    """Return a timeout as servers want it; a fraction of a millisecond is one, for 0 would be none."""
    return max(math.ceil(seconds * 1000), 1)


def limit_statements(engine: Engine, options: DatabaseOptions) -> None:
    """EngineHook: the server stops every statement that takes longer than the app allows."""
    if options.statement_timeout_s is None or options.external_pooler:
        return
    ms = milliseconds(options.statement_timeout_s)

    def on_connect(dbapi_connection: Any, record: object) -> None:
        if engine.dialect.name == "postgresql":
            statement = _POSTGRESQL.format(ms=ms)
        elif _is_mariadb(dbapi_connection):
            statement = _MARIADB.format(s=ms / 1000)
        else:
            statement = _MYSQL.format(ms=ms)
        execute_at_connect(dbapi_connection, statement)

    event.listen(engine, "connect", on_connect)


def _is_mariadb(dbapi_connection: Any) -> bool:
    # Before SQLAlchemy has asked: its dialect knows it after the first connection only.
    version = getattr(dbapi_connection, "server_version", None) or dbapi_connection.get_server_info()
    return "mariadb" in str(version).lower()
