"""Which task a transaction is of, as the server shows it: PostgreSQL's application_name, until the transaction ends."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction

LONGEST = 63
"""Bytes of an application_name; the server cuts off the rest."""
_ID_LENGTH = 8


def name_transactions(session: Session, label: Callable[[], str]) -> None:
    """Let the server show the transactions of `session` under the name of its unit of work: one round trip for each.

    Local to the transaction: a connection pooler, and the next task, see nothing of it.
    """

    def after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        if transaction.parent is None and connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT set_config('application_name', %s, true)", (shortened(label()),))

    event.listen(session, "after_begin", after_begin)


def shortened(label: str) -> str:
    """Return `label`, `task name[task id]`, in at most 63 bytes: the beginning of the id, and what fits of the name."""
    raw = label.encode()
    if len(raw) <= LONGEST:
        return label
    name, bracket, task_id = label.rpartition("[")
    end = f"[{task_id[:_ID_LENGTH]}]" if bracket else ""
    kept = (name if bracket else label).encode()[: LONGEST - len(end.encode())]
    return kept.decode(errors="ignore") + end
