"""Whether a transaction has written anything, for the warning of a unit of work that does not commit."""

from __future__ import annotations

import logging
import re
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.sql.expression import TextClause, TextualSelect

from ..hooks import OpenUnit, UnitHook
from ..names import counted

logger: logging.Logger = logging.getLogger(__name__)

_WROTE = "uncommitted.wrote"

_READS = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/|\()*(select|with|values|table|show|explain|pragma|set)\b", re.I | re.S)
_WRITES = re.compile(r"\b(insert|update|delete|merge)\b", re.I)


class RollBackUnasked(UnitHook):
    """Rolls back a unit of work that ends well, and says so where that undoes something (`commit_on_success=False`).

    ORM, Core and `text()` are watched alike.
    """

    __slots__ = ()

    def opened(self, unit: OpenUnit, session: Session) -> None:
        """Watch the statements of `session`."""
        unit.info[_WROTE] = False

        def note(
            connection: Connection, cursor: object, statement: str, parameters: object, context: Any, many: bool
        ) -> None:
            if not unit.info[_WROTE]:
                unit.info[_WROTE] = _writes(statement, context)

        def after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
            if transaction.parent is None:
                event.listen(connection, "before_cursor_execute", note)

        def after_end(session: Session, transaction: SessionTransaction) -> None:
            if transaction.parent is None:
                unit.info[_WROTE] = False

        event.listen(session, "after_begin", after_begin)
        event.listen(session, "after_transaction_end", after_end)

    def before_commit(self, unit: OpenUnit) -> None:
        """Roll back, with a warning where that undoes something."""
        session = unit.opened
        if session is None or not session.in_transaction():
            return
        wrote = (
            unit.info[_WROTE] or bool(session.new or session.deleted) or any(map(session.is_modified, session.dirty))
        )
        dropped = unit.drop_callbacks()
        unit.roll_back()
        if wrote:
            logger.warning(
                "%s returned with uncommitted changes, and commit_on_success is False: they are rolled back. "
                "Call self.db.commit(), or set commit_on_success=True.",
                unit.label,
            )
        if dropped:
            logger.warning(
                "%s: %s dropped: commit_on_success is False and its transaction was rolled back",
                unit.label,
                counted(dropped, "on_commit callback"),
            )


def _writes(statement: str, context: Any) -> bool:
    construct = getattr(getattr(context, "compiled", None), "statement", None)
    if construct is not None and not isinstance(construct, TextClause | TextualSelect):
        return not construct.is_select
    first = _READS.match(statement)
    return first is None or (first[1].lower() == "with" and bool(_WRITES.search(statement)))
