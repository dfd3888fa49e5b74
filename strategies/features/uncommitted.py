"""Whether a transaction has written anything, for the warning of a unit of work that does not commit."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session
from sqlalchemy.sql.expression import TextClause, TextualSelect

from ..sessions import watch_statements

_READS = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/|\()*(select|with|values|table|show|explain|pragma|set)\b", re.I | re.S)
_WRITES = re.compile(r"\b(insert|update|delete|merge)\b", re.I)


class Writes:
    """Watches the statements of a Session, ORM, Core and `text()` alike."""

    def __init__(self, session: Session) -> None:
        self._wrote = False
        watch_statements(session, self._note, self._forget)

    def found_in(self, session: Session) -> bool:
        """Tell whether the transaction of `session` has written something, or is about to."""
        return self._wrote or bool(session.new or session.deleted) or any(map(session.is_modified, session.dirty))

    def _note(
        self, connection: Connection, cursor: object, statement: str, parameters: object, context: Any, many: bool
    ) -> None:
        construct = getattr(getattr(context, "compiled", None), "statement", None)
        if construct is None or isinstance(construct, TextClause | TextualSelect):
            first = _READS.match(statement)
            is_read = first is not None and not (first[1].lower() == "with" and _WRITES.search(statement))
        else:
            is_read = construct.is_select
        if not is_read:
            self._wrote = True

    def _forget(self) -> None:
        self._wrote = False
