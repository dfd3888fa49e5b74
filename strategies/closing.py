"""The transaction of a Session of ours: to close it without COMMIT or ROLLBACK loses what closing the Session loses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sqlalchemy.orm import Session, SessionTransaction

from ._sqlalchemy import savepoint_of


@contextlib.contextmanager
def told(session: Any) -> Iterator[None]:
    """Do not look what is lost when a transaction of `session` is closed meanwhile: that is known, or is meant."""
    before, session.is_told = session.is_told, True
    try:
        yield
    finally:
        session.is_told = before


def has_written_in(session: Session, transaction: SessionTransaction | None) -> bool:
    """Tell whether `session` may have written since `transaction` has begun, the savepoints in it included.

    Args:
        transaction: None: the root transaction.
    """
    written: bool = session.may_have_written  # type: ignore[attr-defined]
    inner = savepoint_of(session)
    while inner is not None and inner is not transaction:
        written = written or getattr(inner, "written_before", False)
        inner = inner.parent
    return written
