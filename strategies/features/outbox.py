"""The outbox: messages written into a table by the transaction that they belong to, to be sent once it is committed.

One row for each transaction that sends something, with all its messages in their order. Whoever sends locks the row,
sends, and deletes it: killed anywhere in between, the row is still there, and is sent again. At least once, never lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Integer,
    MetaData,
    Select,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.engine import CursorResult
from sqlalchemy.orm import Session

TABLE = "celery_alchemy_outbox"


def outbox_table(metadata: MetaData, name: str = TABLE) -> Table:
    """Return the outbox's table, as part of `metadata`: for `create_all`, and for Alembic to find.

    Args:
        metadata: Your own, for example `Base.metadata`.
    """
    return Table(
        name,
        metadata,
        Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
        Column("created_at", DateTime(timezone=True), server_default=func.now(), nullable=False),
        Column("attempts", Integer, server_default="0", nullable=False),
        Column("messages", Text().with_variant(Text(2**24), "mysql", "mariadb"), nullable=False),
    )


_table = outbox_table(MetaData())
#: Takes the messages of a row, as `write` got them, and sends them; raises where it cannot.
Send = Callable[[str], object]


def write(session: Session, messages: str) -> int:
    """Put the messages of a transaction into the outbox, within it; return the row's id."""
    result = cast("CursorResult[Any]", session.execute(insert(_table).values(messages=messages)))
    key = result.inserted_primary_key
    assert key is not None
    return int(key[0])


def send_row(session: Session, row_id: int, send: Send) -> bool:
    """Send what is in one row and delete it; return whether it was there and nobody else had it."""
    rows = _claim(session, row_id)
    for _, messages in rows:
        send(messages)
        session.execute(delete(_table).where(_table.c.id == row_id))
    return bool(rows)


def send_some(session: Session, count: int, send: Send) -> Iterator[Exception | None]:
    """Send up to `count` rows, oldest first, leaving out those that somebody else is sending; delete what was sent.

    Yields:
        For each row None, or the error it could not be sent with: it stays, and comes after those that never failed.
    """
    for row_id, messages in _claim_some(session, count):
        try:
            send(messages)
        except Exception as error:
            session.execute(update(_table).where(_table.c.id == row_id).values(attempts=_table.c.attempts + 1))
            yield error
        else:
            session.execute(delete(_table).where(_table.c.id == row_id))
            yield None


def count_rows(session: Session) -> int:
    """Return how many rows wait."""
    return session.scalar(select(func.count()).select_from(_table)) or 0


def _claim_some(session: Session, count: int) -> Iterable[tuple[int, str]]:
    order = (_table.c.attempts, _table.c.id)
    if session.get_bind().dialect.name not in {"mysql", "mariadb"}:
        return _lock(session, select(_table.c.id, _table.c.messages).order_by(*order).limit(count))
    # InnoDB locks every row that it looks at, sorted out or not: one by one, by the primary key.
    found = session.scalars(select(_table.c.id).order_by(*order).limit(count)).all()
    return (row for row_id in found for row in _claim(session, row_id))


def _claim(session: Session, row_id: int) -> Sequence[tuple[int, str]]:
    return _lock(session, select(_table.c.id, _table.c.messages).where(_table.c.id == row_id))


def _lock(session: Session, chosen: Select[Any]) -> Sequence[tuple[int, str]]:
    return [(row.id, row.messages) for row in session.execute(chosen.with_for_update(skip_locked=True))]
