"""What waits in the outbox, and whether its table is the one that this version needs."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Engine

from ...strategies.errors import InvalidSetting
from ...strategies.features.outbox_state import State, drift, look, printable
from ..extension import Alchemy
from ..sending.sender import table_of
from .findings import Finding, error, warning

LATE_S = 60.0
"""A message that waits for longer than this is a fault: the broker is away, or nothing sends."""
SETTING = "alchemy_outbox"


def look_at_outbox(db: Alchemy, engine: Engine) -> Iterator[Finding]:
    """Yield what is wrong with the outbox of `db`, the app's default database."""
    try:
        table = table_of(db)
    except InvalidSetting as refused:
        yield error("outbox-table", str(refused), "Set alchemy_outbox_table.", "alchemy_outbox_table")
        return
    with engine.connect() as connection:
        other = drift(connection, table)
        found = look(connection, table) if other is None else None
    if other is not None:
        yield error("outbox-table", f"alchemy_outbox is on, but {other.what}.", f"{other.remedy}.", SETTING)
    if found is None:
        return
    yield from _late(found)
    if found.counts.set_aside:
        yield warning(
            "outbox-set-aside",
            f"{found.counts.set_aside} messages could not be sent, and are set aside{_because(found)}.",
            "celery -A ... alchemy outbox list --set-aside; mend the cause, then `retry --set-aside`, or `drop`.",
            SETTING,
        )


def _late(found: State) -> Iterator[Finding]:
    oldest_s = found.counts.oldest_s or 0.0
    if found.overdue_s > LATE_S:
        yield error(
            "outbox-not-sent",
            f"{found.counts.waiting} messages wait in the outbox, and none has been taken by a sender for "
            f"{found.overdue_s:.0f} s: nothing sends.",
            "Run `celery -A ... alchemy outbox run` as a service of its own, and look at its log.",
            SETTING,
        )
    elif oldest_s > LATE_S:
        yield error(
            "outbox-late",
            f"The oldest of {found.counts.waiting} messages in the outbox has waited for {oldest_s:.0f} s"
            f"{_because(found)}.",
            "celery -A ... alchemy outbox list; see whether the broker can be reached, and the senders' log.",
            SETTING,
        )


def _because(found: State) -> str:
    if found.error is None:
        return ""
    return f"; the last error: {printable(found.error, 200).rstrip('.')}"
