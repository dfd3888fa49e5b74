"""Rows of the outbox that are kept until their receivers have completed: those of tasks with `exactly_once`.

The broker may lose what it has confirmed: Redis forgets, and a worker that is killed between two commands of kombu
takes a message off its list and notes it nowhere. The row is sent again after a pause that is longer than the
visibility timeout, and longer each time. A receiver that has completed does not run again, so that is harmless. A
receiver that has failed, or was refused, is asked for no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

from ...strategies.features import outbox, outbox_kept
from ...strategies.features.completed import Claim, Key
from ...strategies.features.completed_table import LONGEST_ID, chosen_completed_table
from ...strategies.features.exactly_once import probe
from ..apps import Served
from ..errors import as_configuration_error
from ..redelivery import redelivered_within_s

SHARE = 1.5
"""The pause before a message is sent again, as a multiple of the broker's visibility timeout, where no setting says."""
AT_ONCE = outbox_kept.RECEIVED_AT_ONCE
LOOKS_EVERY_S = 5.0
"""A process that sends looks this often which rows have been received."""
UNKNOWN_S = 3600.0
"""The visibility timeout of a broker that has none, for that: RabbitMQ gives back at once what it has confirmed."""


def nesting_of(db: Served, name: str, task_id: str, headers: Mapping[str, Any]) -> int | None:
    """Return how often the receiver of a message has been replaced, where its row is to be kept until that has
    completed; None: it is deleted when it is sent.

    Args:
        db: Of the outbox's database.
        name: Of the task.
    """
    if resend_s(db) <= 0 or len(task_id) > LONGEST_ID or not db.records(name):
        return None
    return int(headers.get("replaced_task_nesting") or 0)


def resend_s(db: Served) -> float:
    """Return after how many seconds a message is sent again whose receiver has not completed; 0: never."""
    wish: float | None = db.settings.outbox_resend_s
    if wish is not None:
        return wish
    return SHARE * (redelivered_within_s(db.app) or UNKNOWN_S)


def drop_received(db: Served, in_transaction: Callable[..., Any]) -> None:
    """Delete rows whose receivers have completed, where that was not done in the last seconds.

    Args:
        in_transaction: `in_transaction(db, work)` returns what `work(session)` does.
    """
    now = monotonic()
    if now < db.looks_received_at or resend_s(db) <= 0 or not db.records():
        return
    db.looks_received_at = now + LOOKS_EVERY_S
    table, completed = outbox.chosen_table(db.settings.outbox_table), _completed(db)
    while in_transaction(db, lambda session: outbox_kept.drop_received(session, table, completed)) >= AT_ONCE:
        pass


def sort(db: Served, rows: Sequence[outbox.Row]) -> tuple[list[outbox.Row], outbox.Record]:
    """Return those of `rows` that are to be sent, and what becomes of the others: some of those that were sent before
    have receivers that have completed, or that run now."""
    to_send, others = [], outbox.Record(pause_s=resend_s(db))
    for row in rows:
        claim = probe(db.engine, _completed(db), Key(row.task_id, row.nesting or 0), row.task) if row.sends else None
        if claim is None:
            to_send.append(row)
        else:
            (others.gone if claim is Claim.DONE else others.again).append(row.id)
    return to_send, others


def _completed(db: Served) -> Any:
    with as_configuration_error():
        return chosen_completed_table(db.settings.completed_table)
