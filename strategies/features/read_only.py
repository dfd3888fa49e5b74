"""Tasks that only read: no transaction, so that one SELECT is one round trip; or a transaction that may not write.

`True` uses a separate Engine, with a connection pool of its own: each statement commits itself (AUTOCOMMIT), and each
connection is set read-only when it is made. No snapshot spans two statements. `"transaction"` uses the ordinary
Engine, and tells the server when the transaction begins that it is read-only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import immutabledict

from .._sqlalchemy import has_changes, locks_rows, streams
from ..base import SessionStrategy
from ..engines.at_connect import execute_at_connect
from ..errors import CeleryAlchemyError
from ..hooks import OpenUnit, UnitHook
from ..options import DatabaseOptions
from ..sessions import become, owner_of

ReadOnly = bool | Literal["transaction"]
IN_TRANSACTION: Literal["transaction"] = "transaction"
MODES: tuple[ReadOnly, ...] = (False, True, IN_TRANSACTION)
_NOTHING: immutabledict[str, Any] = immutabledict()

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

    def on_connect(dbapi_connection: Any, record: object) -> None:
        execute_at_connect(dbapi_connection, statement)

    event.listen(engine, "connect", on_connect)


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
        become(session, ReadingStatements if self._mode is True else ReadingSession)
        if strategy.shares_connection:
            return
        if self._mode is True:
            session.bind = strategy.read_engine
        else:
            _begin_read_only(session, strategy.engine)

    def before_commit(self, unit: OpenUnit) -> None:
        session = unit.opened
        if session is not None and self._mode is True:
            session.flush()  # nothing commits, so nothing else would find what waits to be written, and refuse it
            unit.close()  # each statement has committed itself


class ReadingSession(Session):
    """A Session of a unit of work that only reads. A class, for what listens to a Session costs each task 30 us."""

    def flush(self, objects: Any = None) -> None:
        """Refuse what is to be written.

        Raises:
            ReadOnlyError: there is something.
        """
        if has_changes(self):
            written = [*self.new, *(one for one in self.dirty if self.is_modified(one)), *self.deleted]
            if written:
                names = ", ".join(sorted({type(one).__name__ for one in written}))
                raise ReadOnlyError(
                    f"{_who(self)} is read-only, but would write {names}. Leave read_only out where a task writes."
                )
        super().flush(objects)


class ReadingStatements(ReadingSession):
    """The same where each statement commits itself: what needs a transaction is refused."""

    def execute(self, statement: Any, params: Any = None, *, execution_options: Any = _NOTHING, **more: Any) -> Any:
        """Execute `statement`.

        Raises:
            ReadOnlyError: it needs a transaction.
        """
        self._refuse_what_needs_a_transaction(statement, execution_options)
        return super().execute(statement, params, execution_options=execution_options, **more)

    def scalar(self, statement: Any, params: Any = None, *, execution_options: Any = _NOTHING, **more: Any) -> Any:
        """Execute `statement` as `execute` does; return its first value."""
        self._refuse_what_needs_a_transaction(statement, execution_options)
        return super().scalar(statement, params, execution_options=execution_options, **more)

    def scalars(self, statement: Any, params: Any = None, *, execution_options: Any = _NOTHING, **more: Any) -> Any:
        """Execute `statement` as `execute` does; return the first value of each row."""
        self._refuse_what_needs_a_transaction(statement, execution_options)
        return super().scalars(statement, params, execution_options=execution_options, **more)

    def _refuse_what_needs_a_transaction(self, statement: Any, execution_options: Any) -> None:
        if locks_rows(statement):
            raise ReadOnlyError(
                f"{_who(self)} is read_only=True, without a transaction: FOR UPDATE would let its lock go at once. "
                f"Leave read_only out to lock rows; read_only='transaction' gives one snapshot without locks."
            )
        if streams(execution_options) or streams(getattr(statement, "get_execution_options", dict)()):
            raise ReadOnlyError(
                f"{_who(self)} is read_only=True, without a transaction: a server-side cursor (yield_per, "
                f"stream_results) needs one. Write read_only='transaction'."
            )


def _who(session: Session) -> str:
    """Name the unit of work of `session`, for messages."""
    return getattr(owner_of(session), "label", "A unit of work")


def _begin_read_only(session: Session, engine: Engine) -> None:
    if engine.dialect.name == "postgresql":
        session.bind = engine.execution_options(postgresql_readonly=True)  # part of BEGIN: no round trip
    elif engine.dialect.name in {"mysql", "mariadb"}:

        def after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
            if transaction.parent is None:
                connection.exec_driver_sql("SET TRANSACTION READ ONLY")

        event.listen(session, "after_begin", after_begin)
