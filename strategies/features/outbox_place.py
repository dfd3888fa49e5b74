"""Whether a Session commits to the database of the outbox: else its messages would not be of its transaction."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

from sqlalchemy import Table, insert, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session

from ..errors import OtherDatabase
from ..sessions import connection_for

_MYSQLS = {"mysql", "mariadb"}
_WHO = text("SHOW GLOBAL VARIABLES WHERE Variable_name IN ('server_uid', 'server_uuid', 'hostname', 'port')")


class Place:
    """The database of an outbox.

    Args:
        table: The outbox's table.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self._insert = insert(table)
        self._known: weakref.WeakKeyDictionary[Engine, bool] = weakref.WeakKeyDictionary()

    def engine_of(self, session: Session) -> Engine:
        """Return the Engine that a message would be written with.

        Raises:
            OtherDatabase: the Session has none for the outbox's table.
        """
        try:
            return session.get_bind(clause=self._insert).engine
        except UnboundExecutionError as error:
            raise OtherDatabase(
                f"The Session that was given has no Engine for the outbox's table {self.table.fullname!r}, so no "
                f"message can be written by its transaction. Bind it: Session(engine), or binds={{...}} with the table."
            ) from error

    def refuse_other(self, session: Session, ours: Engine, connection: Connection | None = None) -> None:
        """Refuse a Session of another database than `ours`. Asks both servers once for each Engine.

        Args:
            connection: Of the Session, where it must not be asked for one: in its COMMIT.
        Raises:
            OtherDatabase: it is of another one.
        """
        engine = self.engine_of(session)
        if engine is ours:
            return
        same = self._known.get(engine)
        if same is None:
            same = self._known[engine] = self._is_same(session, ours, connection)
        if not same:
            raise OtherDatabase(
                f"The Session that was given is of {engine.url!r}, and the outbox is in {ours.url!r}: a message "
                f"could not be committed together with it. Use a Session of the outbox's database, or send after the "
                f"COMMIT: call delay() then."
            )

    def is_known(self, session: Session, ours: Engine) -> bool:
        """Tell whether `refuse_other` would ask no server."""
        engine = self.engine_of(session)
        return engine is ours or engine in self._known

    def _is_same(self, session: Session, ours: Engine, connection: Connection | None) -> bool:
        if session.get_bind(clause=self._insert).dialect.name != ours.dialect.name:
            return False
        if connection is None and session.in_transaction():
            connection = connection_for(session, self._insert)
        for _ in range(2):  # a server that is restarted in between has another name
            # Its transaction is its owner's to begin: one that we had begun would be in the way of `session.begin()`.
            given = nullcontext(connection) if connection is not None else self.engine_of(session).connect()
            with given as theirs, ours.connect() as own:
                if self._identity(theirs) == self._identity(own):
                    return True
        return False

    def _identity(self, connection: Connection) -> tuple[Any, ...]:
        """Return what tells the server and the database of `connection` from all others, whichever way one connects."""
        dialect = connection.dialect
        if dialect.name == "postgresql":
            return tuple(
                connection.execute(
                    text("SELECT pg_postmaster_start_time(), oid FROM pg_database WHERE datname = current_database()")
                ).one()
            )
        if dialect.name in _MYSQLS:
            known = {str(name): str(value) for name, value in connection.execute(_WHO)}
            server = known.get("server_uuid") or known.get("server_uid") or (known["hostname"], known["port"])
            return server, self.table.schema or connection.scalar(text("SELECT DATABASE()"))
        if dialect.name == "sqlite":
            files = [row[2] for row in connection.execute(text("PRAGMA database_list")) if row[1] == "main"]
            # One in memory is its connection's own; where both Engines share the connection, it is the same.
            return (files[0],) if files and files[0] else (id(connection.connection.dbapi_connection),)
        return (connection.engine.url.host, connection.engine.url.port, connection.engine.url.database)
