"""Rows of the outbox that are kept until their receivers have ended: those of tasks with `exactly_once`.

The broker may lose what it has confirmed: Redis forgets, and a worker that is killed between two commands of kombu
takes a message off its list and notes it nowhere. The row is sent again after a pause that is longer than the
visibility timeout, and longer each time. A receiver that has completed does not run again, so that is harmless.

The receiver's worker deletes the row (`received`), and not with the COMMIT: after it the result is still to be stored,
its chord to count it, and what Celery sends to be sent. A worker that is killed there leaves the row, and the copy
does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...strategies.features import outbox
from ...strategies.features.completed import Claim, Key
from ...strategies.features.completed_table import chosen_completed_table
from ...strategies.features.exactly_once import probe
from ..apps import Served
from ..crossing import crossing
from ..errors import as_configuration_error
from ..redelivery import redelivered_within_s

SHARE = 1.5
"""The pause before a message is sent again, as a multiple of the broker's visibility timeout, where no setting says."""
UNKNOWN_S = 3600.0
"""The visibility timeout of a broker that has none, for that: RabbitMQ gives back at once what it has confirmed."""


def nesting_of(db: Served, name: str, headers: Mapping[str, Any]) -> int | None:
    """Return how often the receiver of a message has been replaced, where its row is to be kept until that has
    completed; None: it is deleted when it is sent.

    Args:
        db: Of the outbox's database.
        name: Of the task.
    """
    if resend_s(db) <= 0 or not db.records(name):
        return None
    return int(headers.get("replaced_task_nesting") or 0)


def resend_s(db: Served) -> float:
    """Return after how many seconds a message is sent again whose receiver has not completed; 0: never."""
    wish: float | None = db.settings.outbox_resend_s
    if wish is not None:
        return wish
    return SHARE * (redelivered_within_s(db.app) or UNKNOWN_S)


def longest_s(db: Served) -> float:
    """Return how long the pause becomes at most: what a receiver records is kept for longer, and it would run again
    without that."""
    kept_s: float = db.settings.completed_kept_s
    return kept_s / 2


def again_within_s(db: Served) -> float | None:
    """Return within how many seconds a message may come again whose worker was lost: from the broker, or from the
    outbox; None: at once, or it is not known."""
    return max(redelivered_within_s(db.app) or 0.0, resend_s(db) if db.settings.outbox else 0.0) or None


def sort(db: Served, rows: Sequence[outbox.Row]) -> tuple[list[outbox.Row], outbox.Record]:
    """Return those of `rows` that are to be sent, and what becomes of the others: the receivers of some of those that
    were sent before run now; or they have completed, and were told of it often enough."""
    to_send, others = [], outbox.Record(pause_s=resend_s(db))
    for row in rows:
        claim = _claim_of(db, row) if row.sends else None
        if claim is Claim.HELD:
            others.again.append(row.id)
        elif claim is Claim.DONE and row.sends >= db.settings.outbox_attempts:
            others.gone.append(row.id)
        else:
            to_send.append(row)
    return to_send, others


@crossing
def _claim_of(db: Served, row: outbox.Row) -> Claim | None:
    """Tell whether the receiver of `row` runs now, or has completed; None: neither."""
    with as_configuration_error():
        completed = chosen_completed_table(db.settings.completed_table)
    return probe(db.engine, completed, Key(row.task_id, row.nesting or 0), row.task)
