"""A unit of work on one of several databases."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction

from .._sqlalchemy import ACTIVE, connections_of, innermost_of, is_prepared, root_of
from ..drivers.base import driver_of
from ..interrupts import shield
from ..unit_of_work import UnitOfWork
from .names import Name
from .servers import Server


@dataclass(eq=False, slots=True)
class Claim:
    """A transaction that can be prepared: its name, and by whose end it is decided."""

    unit: OneOfSeveral
    server: Server
    transaction: SessionTransaction | None
    name: Name
    """As it was when the transaction began. PostgreSQL needs it only when it prepares."""
    decider: Claim | None
    """None: it decides itself."""
    xid: Name
    """The name that it is prepared under."""
    token: str | None = None
    """What those have in their names that it decides for; asked when there are such."""

    @property
    def connection(self) -> Connection:
        """The connection that the transaction is on."""
        assert self.unit.opened is not None
        return connections_of(self.unit.opened)[0]

    def is_open(self) -> bool:
        """Tell whether its transaction is the one that goes on: code may have ended it by hand."""
        session = self.unit.opened
        return session is not None and root_of(session) is self.transaction and bool(connections_of(session))

    def can_be_asked(self) -> bool:
        """Tell whether a statement would be executed in its transaction: it has not failed."""
        session = self.unit.opened
        if session is None or not self.is_open() or innermost_of(session)[0] is not ACTIVE:
            return False
        connection = self.connection
        if connection.invalidated:
            return False
        return not driver_of(connection.dialect).transaction_failed(connection.connection.dbapi_connection)


class OneOfSeveral(UnitOfWork):
    """A unit of work on one of several databases: its transaction may have been prepared."""

    has_parts = True
    stays_prepared: bool = False
    """Only `in_doubt` may end its transaction."""
    claim: Claim | None = None
    """Of its transaction, with two-phase commit."""

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

    def commit(self, session: Session, transaction: SessionTransaction) -> None:
        session.commit()  # in two phases, or in one

    def refuse_failed(self, session: Session) -> None:
        if not is_prepared(session):
            super().refuse_failed(session)

    def must_discard(self) -> bool:
        return self.stays_prepared

    def flush(self) -> None:
        """Write what is to be written, and refuse a transaction that is broken, before any COMMIT."""
        if self.closed_early is not None:
            self.refuse_closed()
        session = self.opened
        if session is None or not self.commits or not session.in_transaction() or self.read_only is True:
            return
        if not is_prepared(session):
            self.refuse_failed(session)
            session.flush()
