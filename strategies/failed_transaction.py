"""A transaction that failed before, and that is to be committed."""

from __future__ import annotations

from sqlalchemy.orm import Session, SessionTransaction

from ._sqlalchemy import connections_held_by, rollback_exception, root_of
from .drivers.base import driver_of
from .engines.transient import TransientlyBrokenTransaction, is_transient
from .errors import BrokenTransaction

Seen = tuple[BaseException, SessionTransaction | None] | None
"""The last database error, and the transaction it struck."""


def refuse_if_failed(session: Session, label: str, seen: Seen, lost: SessionTransaction | None) -> None:
    """Refuse to commit `session` where its transaction has failed.

    Args:
        label: Names the unit of work.
        lost: The transaction that the server has rolled back by itself.
    Raises:
        BrokenTransaction: it has; the error is its cause.
    """
    transaction = root_of(session)
    if transaction is None:
        return
    for connection in connections_held_by(transaction):
        failed = driver_of(connection.dialect).transaction_failed
        if transaction is lost or connection.invalidated or failed(connection.connection.dbapi_connection):
            break
    else:
        if session.is_active:
            return
    refuse(label, session, seen)


def refuse(label: str, session: Session, seen: Seen) -> None:
    """Refuse to commit `session`, whose transaction has failed.

    Args:
        label: Names the unit of work.
        seen: The last database error, and the transaction it struck.
    Raises:
        BrokenTransaction: always; the error is its cause.
    """
    transaction = root_of(session)
    cause = rollback_exception(transaction)
    if cause is None and seen is not None and seen[1] is transaction:
        cause = seen[0]
    what = f"{type(cause).__name__}: {cause}" if cause is not None else "a database error"
    kind = TransientlyBrokenTransaction if is_transient(cause) else BrokenTransaction
    raise kind(
        f"{label} returned, but its transaction had failed before ({what}), so nothing of it can be committed. Where "
        f"the error is caught, call self.db.rollback() in the except block (or put the statement into "
        f"`with self.db.begin_nested():`, which undoes only itself)."
    ) from cause
