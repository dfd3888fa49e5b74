"""Tasks that only read: no transaction, so that one SELECT is one round trip; or a transaction that may not write.

`True` uses a separate Engine, with a connection pool of its own: each statement commits itself (AUTOCOMMIT), and each
connection is set read-only when it is made. No snapshot spans two statements. `"transaction"` uses the ordinary
Engine, and tells the server when the transaction begins that it is read-only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry

from .._sqlalchemy import has_changes, locks_rows, options_of, streams
from ..base import SessionStrategy
from ..drivers.base import driver_of
from ..engines.at_connect import execute_at_connect
from ..engines.held import name_user
from ..engines.on_error import expect_read_only
from ..errors import CeleryAlchemyError
from ..hooks import OpenUnit, UnitHook
from ..interrupts import is_interrupt
from ..options import DatabaseOptions
from ..sessions import become, owner_of

logger: logging.Logger = logging.getLogger(__name__)

ReadOnly = bool | Literal["transaction"]
IN_TRANSACTION: Literal["transaction"] = "transaction"
MODES: tuple[ReadOnly, ...] = (False, True, IN_TRANSACTION)

#: Sent once for each connection of the Engine that only reads, by dialect.
_SET_READ_ONLY = {
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
    "sqlite": "PRAGMA query_only = ON",
}


class ReadOnlyError(CeleryAlchemyError):
    """A unit of work that is read-only wanted to write, or wanted what only a transaction can give."""


def set_read_only_at_connect(engine: Engine, options: DatabaseOptions) -> None:
    """EngineHook: the server refuses writes on every connection of an Engine that only reads, where it can."""
    if not options.reads or options.external_pooler:
        return
    statement = _SET_READ_ONLY.get(engine.dialect.name)
    if statement is None:
        return

    driver = driver_of(engine.dialect)

    def on_connect(dbapi_connection: Any, record: object) -> None:
        execute_at_connect(dbapi_connection, statement)

    def on_checkin(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        if dbapi_connection is None:
            return  # it was invalidated
        try:
            left = driver.left_on_reading(dbapi_connection)
        except Exception as error:
            if is_interrupt(error):
                raise
            left = "it cannot be asked"
        if left is not None:
            logger.warning(
                "%s has changed a connection on which others read after it: %s. The connection is closed.",
                name_user(record), left,
            )  # fmt: skip
            record.invalidate()

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "checkin", on_checkin)


class ReadOnlyHook(UnitHook):
    """Lets units of work only read.

    Args:
        mode: True or "transaction".
        strategy: Returns the strategy of the database.
    """

    __slots__ = ("_mode", "_strategy")

    def __init__(self, mode: ReadOnly, strategy: Callable[[], SessionStrategy]) -> None:
        self._mode = mode
        self._strategy = strategy

    def opened(self, unit: OpenUnit, session: Session) -> None:
        strategy = self._strategy()
        session.twophase = False  # there is nothing that others would have to agree with
        become(session, kind_of(self._mode))  # where a strategy of the user's has opened it
        if strategy.shares_connection:
            return
        if self._mode is True:
            session.bind = strategy.read_engine
        else:
            _begin_read_only(session, strategy.engine)

    def before_commit(self, unit: OpenUnit) -> None:
        session = unit.opened
        if session is not None and self._mode is True:
            if has_changes(session):
                refuse_changes(session)  # nothing commits, so nothing else would find what waits to be written
            unit.close()  # each statement has committed itself


def refuse_changes(session: Session) -> None:
    """Refuse what is to be written.

    Raises:
        ReadOnlyError: there is something.
    """
    written = [*session.new, *(one for one in session.dirty if session.is_modified(one)), *session.deleted]
    if written:
        names = ", ".join(sorted({type(one).__name__ for one in written}))
        raise ReadOnlyError(
            f"{_who(session)} is read-only, but would write {names}. Leave read_only out where a task writes."
        )


class ReadingSession(Session):
    """A Session of a unit of work that only reads. A class, for what listens to a Session costs each task 30 us."""

    def flush(self, objects: Any = None) -> None:
        """Refuse what is to be written.

        Raises:
            ReadOnlyError: there is something.
        """
        if has_changes(self):  # each statement asks for a flush
            refuse_changes(self)
            super().flush(objects)


class ReadingStatements(ReadingSession):
    """The same where each statement commits itself: what needs a transaction is refused."""

    def execute(self, statement: Any, *params: Any, **more: Any) -> Any:
        """Execute `statement`.

        Raises:
            ReadOnlyError: it needs a transaction.
        """
        self._refuse_what_needs_a_transaction(statement, more)
        return super().execute(statement, *params, **more)

    def scalar(self, statement: Any, *params: Any, **more: Any) -> Any:
        """Execute `statement` as `execute` does; return its first value."""
        self._refuse_what_needs_a_transaction(statement, more)
        return super().scalar(statement, *params, **more)

    def scalars(self, statement: Any, *params: Any, **more: Any) -> Any:
        """Execute `statement` as `execute` does; return the first value of each row."""
        self._refuse_what_needs_a_transaction(statement, more)
        return super().scalars(statement, *params, **more)

    def _refuse_what_needs_a_transaction(self, statement: Any, given: dict[str, Any]) -> None:
        if locks_rows(statement):
            raise ReadOnlyError(
                f"{_who(self)} is read_only=True, without a transaction: FOR UPDATE would let its lock go at once. "
                f"Leave read_only out to lock rows; read_only='transaction' gives one snapshot without locks."
            )
        if streams(options_of(statement)) or (given and streams(given.get("execution_options"))):
            raise ReadOnlyError(
                f"{_who(self)} is read_only=True, without a transaction: a server-side cursor (yield_per, "
                f"stream_results) needs one. Write read_only='transaction'."
            )


def kind_of(mode: ReadOnly) -> type[ReadingSession]:
    """Return the class of Sessions that only read."""
    return ReadingStatements if mode is True else ReadingSession


def _who(session: Session) -> str:
    """Name the unit of work of `session`, for messages."""
    return getattr(owner_of(session), "label", "A unit of work")


def _begin_read_only(session: Session, engine: Engine) -> None:
    if engine.dialect.name == "postgresql":
        session.bind = engine.execution_options(postgresql_readonly=True)  # part of BEGIN: no round trip
    elif engine.dialect.name in {"mysql", "mariadb"}:

        def after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
            if transaction.parent is None:
                expect_read_only(connection)
                connection.exec_driver_sql("SET TRANSACTION READ ONLY")

        event.listen(session, "after_begin", after_begin)
