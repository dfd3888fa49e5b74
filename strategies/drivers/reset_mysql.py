"""MySQL and MariaDB: COM_RESET_CONNECTION, and what it leaves out or takes too much of.

It ends the transaction, drops temporary tables, locks, user variables and prepared statements, and sets all session
variables to the server's. It keeps the database that `USE` has chosen, and the role. What was set when the connection
was made (`autocommit`, the isolation level, what the user's listeners do) is found by doing it once on the new
connection and comparing.

Tried with PyMySQL 1.2.4 and mysqlclient 2.3.2 on MariaDB 10.11. PyMySQL has no method for the command:
`_execute_command`, `_write_bytes`, `_read_ok_packet` and `_next_seq_id` are private. mysqlclient has `change_user()`,
which authenticates again: three round trips more, and it needs the password.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Dialect, Engine
from sqlalchemy.pool import ConnectionPoolEntry

from ..errors import CeleryAlchemyError
from .session_reset import NOTES, SessionReset

COM_INIT_DB, COM_QUERY, COM_RESET_CONNECTION = 0x02, 0x03, 0x1F
#: They say what has happened, not how the session is: to set them would stop the clock.
_NO_SETTINGS = frozenset(
    {
        "timestamp", "rand_seed1", "rand_seed2", "last_insert_id", "identity", "insert_id", "pseudo_thread_id",
        "error_count", "warning_count", "in_transaction", "last_gtid", "statement_id",
    }
)  # fmt: skip
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Remembered:
    """A new session."""

    database: str | None
    charset: tuple[str, str | None]
    """Character set and collation, as the driver has them."""
    again: tuple[str, ...]
    """Statements that make it new again after the server has reset it."""
    parameters: Any = field(default=None, repr=False)
    """What mysqlclient was connected with, the password among it; None: not known."""


class _MySQLReset(SessionReset):
    rolls_back = True

    def remember(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> Remembered:
        before, (database, role) = _variables(dbapi_connection), _place(dbapi_connection)
        bare = Remembered(database, _charset_of(dbapi_connection), (), record.info.get(NOTES))
        self.reset(dbapi_connection, bare)
        after = _variables(dbapi_connection)
        settings = [f"{name} = {value}" for name, value in before.items() if after.get(name) != value]
        again = [*_accepted(dbapi_connection, settings)]
        if role is not None:
            again.append(f"SET ROLE {role}")
            _execute(dbapi_connection, again[-1])
        dbapi_connection.celery_alchemy_left = None
        return replace(bare, again=tuple(again))

    def _mend_charset(self, dbapi_connection: Any, remembered: Remembered) -> None:
        """The driver keeps it by itself, and does not hear of a reset."""
        if _charset_of(dbapi_connection) != remembered.charset:
            dbapi_connection.set_character_set(*remembered.charset)


class PyMySQLReset(_MySQLReset):
    """PyMySQL: the commands are sent together, and their answers read then: one round trip."""

    def reset(self, dbapi_connection: Any, remembered: Remembered) -> None:
        self._mend_charset(dbapi_connection, remembered)
        commands = [(COM_RESET_CONNECTION, "")]
        if remembered.database:
            commands.append((COM_INIT_DB, remembered.database))
        commands += [(COM_QUERY, statement) for statement in remembered.again]
        packets: list[bytes] = []
        dbapi_connection._write_bytes = packets.append
        try:
            for command, text in commands:
                dbapi_connection._execute_command(command, text)
        finally:
            del dbapi_connection._write_bytes
        dbapi_connection._write_bytes(b"".join(packets))
        for _ in commands:
            dbapi_connection._next_seq_id = 1
            dbapi_connection._read_ok_packet()
        dbapi_connection.celery_alchemy_left = None


class MySQLdbReset(_MySQLReset):
    """mysqlclient: the user is authenticated again."""

    def listen(self, engine: Engine) -> None:
        def on_do_connect(
            dialect: Dialect, record: ConnectionPoolEntry | None, arguments: Any, parameters: dict[str, Any]
        ) -> None:
            if record is not None:
                record.info[NOTES] = parameters  # the same object that listeners after this one put a token into

        event.listen(engine, "do_connect", on_do_connect)

    def remember(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> Remembered:
        parameters = record.info.get(NOTES)
        if parameters is None:
            return Remembered(None, _charset_of(dbapi_connection), (), None)
        return super().remember(dbapi_connection, record)

    def reset(self, dbapi_connection: Any, remembered: Remembered) -> None:
        parameters = remembered.parameters
        if parameters is None:
            raise CeleryAlchemyError(
                "mysqlclient resets a session only with the password, and `creator` or a listener has made the "
                "connection; mysql+pymysql needs none"
            )
        self._mend_charset(dbapi_connection, remembered)
        password = parameters.get("passwd", parameters.get("password")) or ""
        dbapi_connection.change_user(parameters.get("user") or "", password, remembered.database or "")
        for statement in remembered.again:
            _execute(dbapi_connection, statement)
        dbapi_connection.celery_alchemy_left = None


def _execute(dbapi_connection: Any, statement: str) -> list[Any]:
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute(statement)
        return list(cursor.fetchall()) if cursor.description else []
    finally:
        cursor.close()


def _variables(dbapi_connection: Any) -> dict[str, str]:
    """Return what is set in the session, ready for a SET: `name` or @`name`, and a literal."""
    shown = _execute(dbapi_connection, "SHOW SESSION VARIABLES")
    found = {f"`{name}`": _literal(value) for name, value in shown if name.lower() not in _NO_SETTINGS}
    with contextlib.suppress(dbapi_connection.Error):  # a plugin of MariaDB's
        own = _execute(dbapi_connection, "SELECT variable_name, variable_value FROM information_schema.user_variables")
        found |= {f"@`{name}`": _literal(value) for name, value in own}
    return found


def _place(dbapi_connection: Any) -> tuple[str | None, str | None]:
    """Return the database, and the role as SET ROLE takes it; None where the server has no roles."""
    try:
        ((database, role),) = _execute(dbapi_connection, "SELECT DATABASE(), CURRENT_ROLE()")
    except dbapi_connection.Error:
        ((database,),) = _execute(dbapi_connection, "SELECT DATABASE()")
        return database, None
    if role is None or role == "NONE":
        return database, "NONE"
    return database, role if role.startswith("`") else f"`{role}`"


def _accepted(dbapi_connection: Any, settings: list[str]) -> Iterable[str]:
    """Execute SET statements for all of these that the server takes, and yield them: it shows some that it computes."""
    if not settings:
        return
    try:
        _execute(dbapi_connection, f"SET {', '.join(settings)}")
        yield f"SET {', '.join(settings)}"
    except dbapi_connection.Error:
        if len(settings) > 1:
            taken = [one for setting in settings for one in _accepted(dbapi_connection, [setting])]
            if taken:
                yield "SET " + ", ".join(one.removeprefix("SET ") for one in taken)


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text if _NUMBER.fullmatch(text) else "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def _charset_of(dbapi_connection: Any) -> tuple[str, str | None]:
    return dbapi_connection.character_set_name(), getattr(dbapi_connection, "collation", None)
