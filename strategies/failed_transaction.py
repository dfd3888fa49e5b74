"""A transaction that failed before, and that is to be committed."""

from __future__ import annotations

from sqlalchemy.orm import Session, SessionTransaction

from ._sqlalchemy import rollback_exception, root_of
from .engines.transient import TransientlyBrokenTransaction, is_transient
from .errors import BrokenTransaction


def refuse(label: str, session: Session, seen: tuple[BaseException, SessionTransaction | None] | None) -> None:
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
