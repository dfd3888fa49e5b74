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
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction

from .._sqlalchemy import locks_rows
from ..base import SessionStrategy
from ..engines.at_connect import execute_at_connect
from ..errors import CeleryAlchemyError
from ..hooks import OpenUnit, UnitHook
from ..options import DatabaseOptions

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
        make_read_only(session, self._strategy(), self._mode, lambda: unit.label)

    def before_commit(self, unit: OpenUnit) -> None:
        session = unit.opened
        if session is not None and self._mode is True:
            session.flush()  # nothing commits, so nothing else would find what waits to be written, and refuse it
            unit.close()  # each statement has committed itself


def make_read_only(session: Session, strategy: SessionStrategy, mode: ReadOnly, who: Callable[[], str]) -> None:
    """Make a Session that has not been used read-only.

    Args:
        who: Returns the name of the unit of work, for messages.
    """

    def refuse_flush(session: Session, context: object, instances: object) -> None:
        written = [*session.new, *(one for one in session.dirty if session.is_modified(one)), *session.deleted]
        if written:
            names = ", ".join(sorted({type(one).__name__ for one in written}))
            raise ReadOnlyError(
                f"{who()} is read-only, but would write {names}. Leave read_only out where a task writes."
            )

    event.listen(session, "before_flush", refuse_flush)
    session.twophase = False  # there is nothing that others would have to agree with
    if mode is True:
        event.listen(session, "do_orm_execute", _refuse_what_needs_a_transaction(who))
    if strategy.shares_connection:
        return
    if mode is True:
        session.bind = strategy.read_engine
    else:
        _begin_read_only(session, strategy.engine)


def _begin_read_only(session: Session, engine: Engine) -> None:
    if engine.dialect.name == "postgresql":
        session.bind = engine.execution_options(postgresql_readonly=True)  # part of BEGIN: no round trip
    elif engine.dialect.name in {"mysql", "mariadb"}:

        def after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
            if transaction.parent is None:
                connection.exec_driver_sql("SET TRANSACTION READ ONLY")

        event.listen(session, "after_begin", after_begin)


def _refuse_what_needs_a_transaction(who: Callable[[], str]) -> Any:
    def on_execute(state: ORMExecuteState) -> None:
        if locks_rows(state.statement):
            raise ReadOnlyError(
                f"{who()} is read_only=True, without a transaction: FOR UPDATE would let its lock go at once. Leave "
                f"read_only out to lock rows; read_only='transaction' gives one snapshot without locks."
            )
        options = state.execution_options
        if options.get("yield_per") or options.get("stream_results"):
            raise ReadOnlyError(
                f"{who()} is read_only=True, without a transaction: a server-side cursor (yield_per, stream_results) "
                f"needs one. Write read_only='transaction'."
            )

    return on_execute
