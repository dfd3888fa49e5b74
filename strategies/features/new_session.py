"""What a Session gets with it when a unit of work opens it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import event
from sqlalchemy.orm import Session

from ..sessions import UNIT
from .read_only import make_read_only
from .transaction_settings import set_in_transactions

if TYPE_CHECKING:
    from ..unit_of_work import UnitOfWork


def set_up(session: Session, unit: UnitOfWork) -> None:
    """Let `session`, which has not been used, be that of `unit`."""
    session.info[UNIT] = unit
    terms = unit.strategy.engines.terms
    if terms.sets_in_transactions and unit.read_only is not True:
        set_in_transactions(session, terms, lambda: unit.label)
    if unit.notes_commits:
        event.listen(session, "after_commit", lambda session: _note_commit(session, unit))
    if unit.read_only:
        make_read_only(session, unit.strategy, unit.read_only, unit.label)


def _note_commit(session: Session, unit: UnitOfWork) -> None:
    if not session.in_nested_transaction():  # a savepoint is released, nothing is committed
        unit.has_committed = True
