"""What waits in the outbox, and whether its table is the one that this version needs."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Engine

from ...strategies.errors import InvalidSetting
from ...strategies.features.outbox_state import State, drift, look, printable
from ...strategies.names import counted
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
            f"{counted(found.counts.set_aside, 'message')} could not be sent, and "
            f"{'is' if found.counts.set_aside == 1 else 'are'} set aside{_because(found)}.",
            "celery -A ... alchemy outbox list --set-aside; mend the cause, then `retry --set-aside`, or `drop`.",
            SETTING,
        )


def _late(found: State) -> Iterator[Finding]:
    oldest_s = found.counts.oldest_s or 0.0
    if found.overdue_s > LATE_S:
        yield error(
            "outbox-not-sent",
            f"In the outbox {_due(found)}. For {found.overdue_s:.0f} s no sender has taken what is due: nothing sends.",
            "Run `celery -A ... alchemy outbox run` as a service of its own, and look at its log.",
            SETTING,
        )
    elif oldest_s > LATE_S:
        yield error(
            "outbox-late",
            f"In the outbox {_due(found)}. The oldest has waited for {oldest_s:.0f} s{_because(found)}.",
            "celery -A ... alchemy outbox list; see whether the broker can be reached, and the senders' log.",
            SETTING,
        )


def _due(found: State) -> str:
    waiting, again = found.counts.waiting, found.due_again
    parts = [f"{counted(waiting, 'message')} wait{'s' if waiting == 1 else ''} to be sent"] if waiting else []
    if again:
        was, has = ("was", "its receiver has") if again == 1 else ("were", "their receivers have")
        be = "is" if again == 1 else "are"
        parts.append(f"{counted(again, 'message')} {was} sent, {has} not told that the task ended, and {be} due again")
    return "; ".join(parts) or "is nothing"


def _because(found: State) -> str:
    if found.error is None:
        return ""
    return f"; the last error: {printable(found.error, 200).rstrip('.')}"
