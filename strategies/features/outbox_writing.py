"""When the messages of a transaction are written into the outbox: last, by whatever way it is committed."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from sqlalchemy import Table, event, insert, inspect
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, SessionTransaction

from .._sqlalchemy import commits_itself, connections_of, is_preparing, is_two_phase, root_of
from ..drivers.base import driver_of
from ..errors import InvalidSetting
from ..sessions import connection_for
from .outbox_table import HOW_TO_CREATE, missing_columns

_WRITER = "celery_alchemy_outbox"
"""Attribute of a Session for whose COMMIT a message has ever waited."""
_COMMITTING = "celery_alchemy_committing"
"""Attribute of a Session: its root transaction, from when its COMMIT begins."""
_NO_SUCH_TABLE = frozenset({"42P01", 1146})  # PostgreSQL's code, MySQL's
_NO_SUCH_COLUMN = frozenset({"42703", 1054})
_NOT_ALLOWED = frozenset({"42501", 1142, 1143})
"""PostgreSQL's insufficient_privilege; MySQL's, of a table and of a column."""
_listening = threading.Lock()


class Commit(Enum):
    """What comes after the messages are written."""

    OWN = auto()
    """The Session's COMMIT."""
    PREPARED = auto()
    """Its two-phase commit: PostgreSQL prepares no transaction that has notified."""
    OTHERS = auto()
    """The COMMIT of other code, on a connection whose transaction that has begun; the Session is not told of it."""


class Writer:
    """Calls `write` right before each COMMIT of a Session, on the connection that is committed.

    Args:
        table: The outbox's table; it says which of the Session's databases it is about.
        write: `write(connection, how)` writes what waits.
        is_awaited: Tells whether anything waits.
    """

    __slots__ = ("_attached", "_insert", "_is_awaited", "_outer", "_session", "_write")

    def __init__(
        self,
        session: Session,
        table: Table,
        write: Callable[[Connection, Commit], None],
        is_awaited: Callable[[], bool],
    ) -> None:
        self._session, self._write, self._is_awaited = session, write, is_awaited
        self._insert = insert(table)
        self._attached: Connection | None = None
        self._outer: Connection | None = None

    def registered(self) -> None:
        """A message waits for the COMMIT now. It may be in its middle: in the flush before it, in a listener."""
        session = self._session
        if session.twophase and session.is_active:
            self._attach()  # a transaction that is to be prepared with others must have begun before they are
            return
        root = root_of(session)
        if root is None or not session.is_active:
            return
        committing: SessionTransaction | None = getattr(session, _COMMITTING, None)
        if root is committing or connections_of(session) or is_preparing(session):
            self._attach()

    def before_commit(self) -> None:
        """The root transaction is about to be flushed and committed."""
        if self._is_awaited():
            self._attach()

    def after_commit(self) -> None:
        """The root transaction of the Session is committed, or what stands for it in the transaction of other code."""
        connection, self._outer = self._outer, None
        if connection is not None and self._is_awaited():
            self._write(connection, Commit.OTHERS)
        if self._attached is not None and self._attached is self._session.bind:
            event.remove(self._attached, "commit", self._ends)  # it lives on, maybe with a Session for each request
            self._attached = None

    def _attach(self) -> None:
        """Write when the connection is committed, or prepared: nothing comes after that."""
        session = self._session
        connection = connection_for(session, self._insert)
        if not commits_itself(session, connection):
            self._outer = connection  # other code commits it: see `after_commit`
        elif self._attached is not connection:
            self._attached = connection
            event.listen(connection, "commit", self._ends)
            if is_two_phase(connection):
                event.listen(connection, "prepare_twophase", self._prepares)
                event.listen(connection, "commit_twophase", self._commits_twophase)

    def _ends(self, connection: Connection) -> None:
        if self._is_awaited():
            self._write(connection, Commit.OWN)

    def _prepares(self, connection: Connection, xid: Any) -> None:
        if self._is_awaited():
            self._write(connection, Commit.PREPARED)

    def _commits_twophase(self, connection: Connection, xid: Any, is_prepared: bool) -> None:
        if not is_prepared:
            self._ends(connection)


def writer_of(session: Session) -> Writer | None:
    """Return the Writer of `session`; None: no message has ever waited for its COMMIT."""
    return getattr(session, _WRITER, None)


def follow(session: Session, make: Callable[[], Writer]) -> Writer:
    """Return the Writer of `session`, made now where it has none."""
    if not is_preparing(session):  # a listener of all Sessions may be the one that has sent
        listen()
    writer = writer_of(session)
    if writer is None:
        writer = make()
        setattr(session, _WRITER, writer)
    return writer


def listen() -> None:
    """Follow the COMMITs of all Sessions of this process: a message may be registered in one that is going on, when it
    would be too late to listen to that Session.

    Before any thread or greenlet is in a COMMIT, where that can be: SQLAlchemy fails one that goes through a list of
    listeners which grows.
    """
    if event.contains(Session, "after_commit", _after_commit):
        return
    with _listening:
        if not event.contains(Session, "after_commit", _after_commit):
            event.listen(Session, "before_commit", _before_commit)
            event.listen(Session, "after_commit", _after_commit)


def _before_commit(session: Session) -> None:
    if session.in_nested_transaction():
        return  # a savepoint is released, nothing is committed
    setattr(session, _COMMITTING, root_of(session))
    writer = writer_of(session)
    if writer is not None:
        writer.before_commit()


def _after_commit(session: Session) -> None:
    writer = writer_of(session)
    if writer is not None and not session.in_nested_transaction():
        writer.after_commit()


def explained(error: DBAPIError, bind: Connection | Engine, table: Table) -> Exception:
    """Return what to raise where the outbox's table could not be used: `error`, or one that says what to do."""
    found = _trouble(error, bind, table)
    return error if found is None else InvalidSetting(f"alchemy_outbox is on, but {found}")


def _trouble(error: DBAPIError, bind: Connection | Engine, table: Table) -> str | None:
    lacks_table, lacks_column = _lacks(error, bind, table)
    if lacks_table:
        return (
            f"the database has no table {table.fullname!r}, which the messages of a transaction are written into. "
            f"Create it: {HOW_TO_CREATE}."
        )
    if lacks_column:
        return (
            f"the table {table.fullname!r} is of an older version: it does not have all columns that this one needs. "
            f"Send what is in it, then migrate it: `alembic revision --autogenerate`, or see docs/outbox.md."
        )
    return _lacks_right(error, bind, table)


def _lacks_right(error: DBAPIError, bind: Connection | Engine, table: Table) -> str | None:
    """Say what the user of the database may not do with the table; None where that is not the trouble."""
    if not _is_of(error, table) or _code_of(error, bind) not in _NOT_ALLOWED:
        return None
    verbs = re.findall(r"\b(INSERT|SELECT|UPDATE|DELETE)\b", error.statement or "")
    verb = "INSERT" if "INSERT" in verbs else (verbs or ["use it"])[0]
    user = bind.engine.url.username or "..."
    remedy = f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table.fullname} TO {user}"
    if bind.dialect.name == "postgresql":
        remedy += f"; GRANT USAGE ON SEQUENCE {table.fullname}_id_seq TO {user}"
    return (
        f"the database does not let its user {verb} in the table {table.fullname!r} ({error.orig}). Remedy: {remedy}. "
        f"With alchemy_outbox = 'relay', who commits needs no more than INSERT; senders need the others."
    )


def _is_of(error: DBAPIError, table: Table) -> bool:
    return table.name in (error.statement or "")


def _code_of(error: DBAPIError, bind: Connection | Engine) -> Any:
    return driver_of(bind.dialect).code_of(error.orig) if error.orig is not None else None


def _lacks(error: DBAPIError, bind: Connection | Engine, table: Table) -> tuple[bool, bool]:
    if not _is_of(error, table):
        return False, False
    dialect = bind.dialect
    if dialect.name == "sqlite":  # has no code for it, and goes on with the transaction
        found = inspect(bind)
        if not found.has_table(table.name, schema=table.schema):
            return True, False
        names = {column["name"] for column in found.get_columns(table.name, schema=table.schema)}
        return False, bool(missing_columns(names))
    code = _code_of(error, bind)
    return code in _NO_SUCH_TABLE, code in _NO_SUCH_COLUMN
