"""A transaction that failed before, and that somebody wants to commit."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy.orm import Session, SessionTransaction

from .drivers.base import transaction_failed
from .engines.transient import TransientlyBrokenTransaction, is_transient
from .errors import BrokenTransaction
from .sessions import connections_of


def refuse_broken(
    session: Session,
    who: Callable[[], str],
    seen: tuple[BaseException, SessionTransaction | None] | None,
    lost: SessionTransaction | None,
) -> None:
    """Refuse to commit `session` when its transaction has failed.

    Args:
        who: Names the unit of work.
        seen: The last database error, and the transaction it struck.
        lost: The transaction that the server has rolled back.
    Raises:
        BrokenTransaction: it has; the error is its cause.
    """
    transaction = session.get_transaction()
    for connection in connections_of(session):
        if transaction is lost or connection.invalidated or transaction_failed(connection.connection.dbapi_connection):
            break
    else:
        if session.is_active:
            return
    cause = getattr(transaction, "_rollback_exception", None)
    if cause is None and seen is not None and seen[1] is transaction:
        cause = seen[0]
    what = f"{type(cause).__name__}: {cause}" if cause is not None else "a database error"
    kind = TransientlyBrokenTransaction if is_transient(cause) else BrokenTransaction
    raise kind(
        f"{who()} returned, but its transaction had failed before ({what}), so nothing of it can be committed. Where "
        f"the error is caught, call self.db.rollback() in the except block (or put the statement into "
        f"`with self.db.begin_nested():`, which undoes only itself)."
    ) from cause
