"""PostgreSQL: what DISCARD ALL does, but for the statements that the driver has prepared, in one round trip.

`RESET ALL` goes back to what the connection string, `ALTER ROLE` and `ALTER DATABASE` say. What was set by SQL when the
connection was made, by us or by the user's listeners, is asked for once, and set again in the same round trip. The
server lists all settings but those whose name it does not know (`app.tenant`): their names are taken from the
statements that were executed while the connection was made, and the server tells which of them are settings.

Tried with psycopg 3.3.9 and psycopg2 2.9.13. Private of psycopg is `_notifies_backlog`, from 3.2 on; without it a
notification that came before the reset reaches whoever asks for notifications next.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy.pool import ConnectionPoolEntry

from .session_reset import NOTES, SessionReset

#: In the order of DISCARD ALL, without DEALLOCATE ALL and DISCARD PLANS. Sent as one text, which the server takes for
#: one transaction.
_RESET = (
    "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; UNLISTEN *; "
    "SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES"
)
#: Comes last: the answer names what was prepared by SQL, and not by the driver.
_PREPARED_BY_SQL = "SELECT name FROM pg_catalog.pg_prepared_statements WHERE from_sql"
#: Settings with the source "session" were made by SQL; three are those of the current transaction.
_ASK = """
SELECT pg_catalog.format('pg_catalog.set_config(%%L, %%L, false)', name, setting) FROM (
  SELECT name, setting FROM pg_catalog.pg_settings
  WHERE source = 'session' AND context <> 'internal'
    AND name NOT IN ('transaction_isolation', 'transaction_read_only', 'transaction_deferrable')
  UNION ALL
  SELECT name, pg_catalog.current_setting(name, true) FROM pg_catalog.unnest(%s::text[]) AS name
  WHERE pg_catalog.current_setting(name, true) IS NOT NULL
) AS settings"""
_ASK_WHO = """
SELECT pg_catalog.format('SET SESSION AUTHORIZATION %%I', session_user) WHERE session_user <> %s::text
UNION ALL
SELECT pg_catalog.format('SET ROLE %%I', pg_catalog.current_setting('role'))
WHERE pg_catalog.current_setting('role') <> 'none'"""
#: What may be the name of a setting of the user's own.
_DOTTED = re.compile(r"[A-Za-z_][\w$]*(?:\.[A-Za-z_][\w$]*)+")
_DEFAULT = "DEFAULT"


@dataclass(frozen=True, slots=True)
class Remembered:
    """A new session."""

    statements: str
    """What resets the session, and makes it new again."""
    encoding: str | None
    """Of a driver that keeps it by itself."""


class _Notes:
    """The statements that are executed while a connection is made."""

    def __init__(self, dbapi_connection: Any, plain: type[Any]) -> None:
        self._before = dbapi_connection.cursor_factory
        texts: list[str] = []
        factory: Any = self._before or plain

        class Noting(factory):  # type: ignore[misc]
            celery_alchemy_instead_of = self._before

            def execute(self, query: Any, *arguments: Any, **options: Any) -> Any:
                texts.append(f"{query} {arguments} {options}")
                return super().execute(query, *arguments, **options)

        self._texts = texts
        self._factory = dbapi_connection.cursor_factory = Noting

    def end(self, dbapi_connection: Any) -> list[str]:
        """Note no more; return what may be names of settings."""
        if dbapi_connection.cursor_factory is self._factory:
            dbapi_connection.cursor_factory = self._before
        return sorted({name for text in self._texts for name in _DOTTED.findall(text)})


class _PostgreSQLReset(SessionReset):
    """What both drivers have in common."""

    options: dict[str, Any] = {}  # noqa: RUF012
    """Of `execute`."""

    @abstractmethod
    def plain(self) -> type[Any]:
        """Return the driver's own class of cursors."""

    @abstractmethod
    def cursor(self, dbapi_connection: Any) -> Any:
        """Return a cursor whose rows are tuples, whatever the user's are."""

    @abstractmethod
    def outside(self, dbapi_connection: Any) -> AbstractContextManager[None]:
        """Let a block execute outside of any transaction."""

    @abstractmethod
    def last_rows(self, cursor: Any) -> list[Any]:
        """Return the rows of the last statement that `cursor` has executed."""

    def made(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        record.info[NOTES] = _Notes(dbapi_connection, self.plain())

    def remember(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> Remembered:
        notes: _Notes | None = record.info.pop(NOTES, None)
        names = notes.end(dbapi_connection) if notes is not None else []
        with self.outside(dbapi_connection), self.cursor(dbapi_connection) as cursor:
            cursor.execute(_ASK, (names,))
            calls = [row[0] for row in cursor.fetchall()]
            cursor.execute(_ASK_WHO, (dbapi_connection.info.user,))
            whose = [row[0] for row in cursor.fetchall()]
        again = [f"SELECT {', '.join(calls)}"] if calls else []
        statements = "; ".join([_RESET, *again, *whose, _PREPARED_BY_SQL])
        return Remembered(statements, getattr(dbapi_connection, "encoding", None))

    def reset(self, dbapi_connection: Any, remembered: Remembered) -> None:
        with self.outside(dbapi_connection), self.cursor(dbapi_connection) as cursor:
            cursor.execute(remembered.statements, **self.options)
            prepared = [row[0].replace('"', '""') for row in self.last_rows(cursor)]
            if prepared:
                cursor.execute("; ".join(f'DEALLOCATE "{name}"' for name in prepared), **self.options)


class PsycopgReset(_PostgreSQLReset):
    """psycopg 3."""

    options: dict[str, Any] = {"prepare": False}  # noqa: RUF012

    def plain(self) -> type[Any]:
        import psycopg

        return psycopg.Cursor

    def cursor(self, dbapi_connection: Any) -> Any:
        from psycopg.rows import tuple_row

        return self.plain()(dbapi_connection, row_factory=tuple_row)

    @contextmanager
    def outside(self, dbapi_connection: Any) -> Iterator[None]:
        switches = not dbapi_connection.autocommit
        if switches:
            dbapi_connection.autocommit = True
        yield
        if switches:
            dbapi_connection.autocommit = False

    def last_rows(self, cursor: Any) -> list[Any]:
        while cursor.nextset():
            pass
        found: list[Any] = cursor.fetchall()
        return found

    def reset(self, dbapi_connection: Any, remembered: Remembered) -> None:
        super().reset(dbapi_connection, remembered)
        received = getattr(dbapi_connection, "_notifies_backlog", None)
        if received is not None:
            received.clear()


class Psycopg2Reset(_PostgreSQLReset):
    """psycopg2."""

    def plain(self) -> type[Any]:
        from psycopg2 import extensions

        found: type[Any] = extensions.cursor
        return found

    def cursor(self, dbapi_connection: Any) -> Any:
        return self.plain()(dbapi_connection)

    @contextmanager
    def outside(self, dbapi_connection: Any) -> Iterator[None]:
        if dbapi_connection.autocommit:
            yield
            return
        own = dbapi_connection.isolation_level, dbapi_connection.readonly, dbapi_connection.deferrable
        if own != (None, None, None):
            # A driver that is switched to autocommit sends what was set as settings of the session.
            dbapi_connection.set_session(_DEFAULT, _DEFAULT, _DEFAULT)
        dbapi_connection.autocommit = True
        yield
        dbapi_connection.autocommit = False
        if own != (None, None, None):
            dbapi_connection.set_session(*(_DEFAULT if one is None else one for one in own))

    def last_rows(self, cursor: Any) -> list[Any]:
        found: list[Any] = cursor.fetchall()  # the driver keeps no others
        return found

    def reset(self, dbapi_connection: Any, remembered: Remembered) -> None:
        super().reset(dbapi_connection, remembered)
        if dbapi_connection.encoding != remembered.encoding:
            # The driver keeps it by itself, and does not hear of what the server was told.
            dbapi_connection.set_client_encoding(remembered.encoding)
        del dbapi_connection.notifies[:]
