"""A transaction that failed before, or was ended behind SQLAlchemy's back, and that is to be committed."""

from __future__ import annotations

from typing import NoReturn

from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.orm import Session, SessionTransaction

from .._sqlalchemy import connections_held_by, rollback_exception, root_of
from ..drivers.base import Ended, code_of, driver_of
from ..errors import BrokenTransaction
from .transient import TransientlyBrokenTransaction, is_transient

Seen = tuple[BaseException, SessionTransaction | None] | None
"""The last database error, and the transaction it struck."""
_IN_FAILED_TRANSACTION = "25P02"


def refuse_if_failed(session: Session, label: str, seen: Seen) -> None:
    """Refuse to commit `session` where its transaction has failed.

    Args:
        label: Names the unit of work.
    Raises:
        BrokenTransaction: it has; the error is its cause.
    """
    transaction = root_of(session)
    if transaction is None:
        return
    for connection in connections_held_by(transaction):
        if connection.invalidated:
            break
        ended = driver_of(connection.dialect).what_ended(connection.connection)
        if ended is not None:
            refuse(label, ended, _cause(transaction, seen))
    else:
        if session.is_active:
            return
    refuse(label, Ended(), _cause(transaction, seen))


def explained(error: BaseException, label: str, transaction: SessionTransaction | None, seen: Seen) -> BaseException:
    """Return `error`, with which the COMMIT of `transaction` has failed, or in its place the one that says what had
    failed before."""
    ended = getattr(error, "ended", None)
    if not isinstance(error, PendingRollbackError) and not _met_a_failed_one(error):
        return error
    try:
        refuse(label, ended or Ended(), error.__cause__ if ended is not None else None, _cause(transaction, seen))
    except BrokenTransaction as broken:
        return broken


def refuse(label: str, ended: Ended, *causes: BaseException | None) -> NoReturn:
    """Refuse to commit a transaction that has failed or was ended.

    Args:
        label: Names the unit of work, or the transaction.
        causes: The error that it failed with; the first that is known.
    Raises:
        BrokenTransaction: always; the error is its cause.
    """
    cause = next((one for one in (ended.error, *causes) if one is not None), None)
    kind = TransientlyBrokenTransaction if is_transient(cause) else BrokenTransaction
    what = f"{type(cause).__name__}: {cause}" if cause is not None else "a database error"
    if ended.by_code:
        message = (
            f"{label} cannot be committed: {ended.by_code} on the connection of its Session, so that what was written "
            f"before is not in its transaction any more. Use self.db.commit(), self.db.rollback() or "
            f"`with self.db.begin_nested():` instead."
        )
    else:
        message = (
            f"{label} cannot be committed: its transaction had failed before ({what}). Where the error is caught, call "
            f"self.db.rollback() in the except block (or put the statement into `with self.db.begin_nested():`, which "
            f"undoes only itself)."
        )
    broken = kind(message)
    broken.ended = ended
    raise broken from cause


def _cause(transaction: SessionTransaction | None, seen: Seen) -> BaseException | None:
    cause = rollback_exception(transaction)
    if cause is None and seen is not None and seen[1] is transaction:
        cause = seen[0]
    return cause


def _met_a_failed_one(error: BaseException) -> bool:
    """Tell whether a flush of the COMMIT has met a transaction that had failed before."""
    return isinstance(error, DBAPIError) and error.orig is not None and code_of(error.orig) == _IN_FAILED_TRANSACTION
