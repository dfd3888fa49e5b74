"""A unit of work on one of several databases."""

from __future__ import annotations

from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from .._sqlalchemy import is_prepared
from ..interrupts import shield
from ..unit_of_work import UnitOfWork


class OneOfSeveral(UnitOfWork):
    """A unit of work on one of several databases: its transaction may have been prepared."""

    has_parts = True
    stays_prepared = False
    """Only `in_doubt` may end its transaction."""
    decision: tuple[str, str] | None = None
    """Of the whole, for two-phase commit: what the names of the transactions have in common."""
    decider: OneOfSeveral | None = None
    """Of the whole: the one whose database decides whether all are committed."""

    @property
    def whole(self) -> OneOfSeveral:
        """The unit of work over all databases."""
        raise NotImplementedError

    @shield.covers
    def end_well(self) -> None:
        session = self.opened
        # Should the COMMIT fail, it is not known what the server has done.
        self.stays_prepared = session is not None and session.in_transaction() and is_prepared(session)
        super().end_well()
        self.stays_prepared = False

    def refuse_failed(self, session: Session) -> None:
        if not is_prepared(session):
            super().refuse_failed(session)

    def must_discard(self) -> bool:
        return self.stays_prepared

    def discard(self, session: Session, connections: list[Connection]) -> None:
        decider = self.whole.decider
        if is_prepared(session) and decider is not None and decider is not self:
            decider.stays_prepared = True  # while it is, this one is rolled back
        super().discard(session, connections)

    def flush(self) -> None:
        """Write what is to be written, and refuse a transaction that is broken, before any COMMIT."""
        session = self.opened
        if session is None or not self.commits or not session.in_transaction() or self.read_only is True:
            return
        if not is_prepared(session):
            self.refuse_failed(session)
            session.flush()
