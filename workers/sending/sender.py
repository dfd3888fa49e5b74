"""What sends the messages of the outbox: the process that has committed, and any other that finds them waiting.

No database connection is held while the broker is talked to. What was sent is recorded after twenty messages at the
latest, in a small transaction of its own.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic, sleep
from typing import Any, TypeVar

from sqlalchemy import Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from ...strategies.engines.transient import is_transient
from ...strategies.features import outbox
from ...strategies.features.outbox_state import printable
from ...strategies.features.outbox_writing import explained
from ...strategies.interrupts import is_interrupt
from ..apps import Served
from ..crossing import on_its_loop
from ..errors import BrokerGone, as_configuration_error
from . import kept
from .broker import breaker_of, connected
from .capturing import Capture, has_expired
from .publication import Publication, from_text, refuse_unaccepted, waits_s

logger: logging.Logger = logging.getLogger(__name__)

BATCH = 50
"""Transactions whose messages a sender claims at one time."""
TRIES = 5
"""Of a small transaction that fails with a deadlock, say."""
SHOWN = 255
"""Characters of a name or an error, in a line of the log."""
T = TypeVar("T")
RECORD_EVERY = 20
"""Messages that may be sent and not be recorded yet: as many arrive twice when the process is killed."""


@dataclass(slots=True)
class Tally:
    """What this process has done with messages of the outbox, since it began."""

    sent: int = 0
    failed: int = 0
    """Attempts that failed by a fault of the message."""
    expired: int = 0
    set_aside: int = 0


tally: Tally = Tally()


@dataclass(slots=True)
class Item:
    """A message to send."""

    key: Any
    """Names its row."""
    task_id: str
    task: str
    publication: Publication | Callable[[], Publication]
    """Or what reads it from the row, and may raise."""
    capture: Capture | None = None
    """Where it was captured by this process."""
    kept: bool = False
    """Its row is kept until its receiver has completed."""


def table_of(db: Served) -> Table:
    """Return the table that the messages of `db` are written into.

    Raises:
        InvalidSetting: it is not clear which.
    """
    return outbox.chosen_table(db.settings.outbox_table)


def in_transaction(db: Served, work: Callable[[Session], T], *, one_row: bool = False) -> T:
    """Return what `work(session)` does, in a small transaction on the database of the outbox; done again where that
    fails with an error that passes by itself.

    Args:
        one_row: It changes one row, by its unique key.
    Raises:
        ConfigurationError: there is no such table, or one of an older version.
    """
    table = table_of(db)

    def attempt() -> T:
        with as_configuration_error(), db.unit_of_work() as session:
            if not one_row:
                outbox.lock_no_gaps(session, table)
            return work(session)

    for left in reversed(range(TRIES)):
        try:
            return on_its_loop(db, attempt)
        except DBAPIError as error:
            if left and is_transient(error):
                sleep(random.uniform(0, 0.05))  # noqa: S311 - no secret
                continue
            with as_configuration_error():
                known = on_its_loop(db, functools.partial(_explained, error, db, table))
                raise known from (error if known is not error else error.__cause__)
    raise AssertionError


def _explained(error: DBAPIError, db: Served, table: Table) -> Exception:
    return explained(error, db.engine, table)


def send_items(
    db: Served, items: Sequence[Item], until: float, stopping: Callable[[], bool] = lambda: False
) -> tuple[int, int]:
    """Send `items`, in their order; return how many were sent, and how many failed.

    Args:
        until: `monotonic()` from when on no more is sent: the lease lasts not much longer.

    Raises:
        BrokerGone: what was not sent is due again after a pause.
        DBAPIError: what was sent could not be recorded; it is sent again when the lease is over.
    """
    app = db.app
    breaker = breaker_of(app)
    sent = failed = 0
    what = _nothing(db)
    with connected(app) as broker:
        for number, item in enumerate(items):
            if stopping() or monotonic() >= until:
                what.again = [one.key for one in items[number:]]
                break
            try:
                publication = item.publication if isinstance(item.publication, Publication) else item.publication()
                if has_expired(publication):
                    what.gone.append(item.key)
                    tally.expired += 1
                    logger.info("%s has expired in the outbox, and is not sent", _named(item.task, item.task_id))
                    continue
                refuse_unaccepted(app, publication)
                if item.capture is not None:
                    broker.expect_result(item.task_id, publication)
                broker.publish(publication)
            except BrokerGone:
                what.again, what.pause_s = [one.key for one in items[number:]], breaker.failed()
                _record(db, what)
                raise
            except Exception as error:
                if is_interrupt(error):
                    what.again = [one.key for one in items[number:]]
                    _record(db, what)
                    raise
                failed += 1
                what.failed[item.key] = f"{type(error).__name__}: {error}"
            else:
                breaker.answered()
                sent += 1
                wait_s = waits_s(app, publication) if item.kept else 0.0
                if wait_s:
                    _record(db, replace(_nothing(db), sent=[item.key], resend_s=what.resend_s + wait_s))
                else:
                    (what.sent if item.kept else what.gone).append(item.key)
                if item.capture is not None:
                    _tell(item.capture, app, broker.producer)
            if what.failed or len(what.gone) + len(what.sent) >= RECORD_EVERY:
                _record(db, what)
                what = _nothing(db)
    _record(db, what)
    return sent, failed


def _nothing(db: Served) -> outbox.Record:
    return outbox.Record(resend_s=kept.resend_s(db), longest_s=kept.longest_s(db))


def _tell(capture: Capture, app: Any, producer: Any) -> None:
    try:
        capture.published(app, producer)
    except Exception as error:
        if is_interrupt(error):
            raise
        logger.exception("%s[%s] is sent; after that a listener failed", capture.name, capture.task_id)


def _record(db: Served, what: outbox.Record) -> None:
    if not what:
        return
    tally.sent += len(what.gone) + len(what.sent)
    tally.failed += len(what.failed)
    attempts = db.settings.outbox_attempts
    aside = in_transaction(
        db,
        lambda session: outbox.record(session, table_of(db), what, attempts=attempts),
        one_row=len(what.gone) + len(what.sent) + len(what.failed) + len(what.again) == 1,
    )
    for error in what.failed.values():
        logger.warning("A message of the outbox could not be sent: %s", printable(error, SHOWN))
    for row in aside:
        tally.set_aside += 1
        logger.error(
            "%s could not be %s %d times, and is set aside in the outbox: %s. `celery alchemy outbox list` shows it; "
            "`retry` or `drop` it there.",
            _named(row.task, row.task_id), "delivered" if row.sends else "sent", row.sends or row.attempts,
            printable(row.error or "", SHOWN),
        )  # fmt: skip


def _named(task: str, task_id: str) -> str:
    """Return how a message is called in the log; whoever can write to the table may have chosen its names."""
    return f"{printable(task, SHOWN)}[{printable(task_id, SHOWN)}]"


def send_waiting(db: Served, count: int = BATCH, stopping: Callable[[], bool] = lambda: False) -> tuple[int, int]:
    """Send what is due of up to `count` transactions in the outbox; return how many messages were sent, and how many
    could not be.

    Args:
        stopping: Asked before each message: True ends it, and what was sent is recorded.
    Raises:
        kombu.exceptions.OperationalError: the broker cannot be reached; what was not sent waits.
    """
    table = table_of(db)
    until = sends_until()

    def claim(session: Session) -> tuple[list[outbox.Row], tuple[int, dict[int, str]]]:
        found = outbox.claim(session, table, count)
        return found, outbox.load(session, table, found)

    rows, (loaded, texts) = in_transaction(db, claim)
    if any(row.sends for row in rows):
        rows, others = kept.sort(db, rows)
        _record(db, others)
        loaded, texts = in_transaction(db, functools.partial(outbox.load, table=table, rows=rows)) if rows else (0, {})
    sent = failed = 0
    while rows:
        part, rows = rows[:loaded], rows[loaded:]
        try:
            done = send_items(db, [_item(row, texts) for row in part if row.id in texts], until, stopping)
        except BrokerGone:
            _record(db, outbox.Record(again=[row.id for row in rows], pause_s=breaker_of(db.app).pause_s))
            raise
        sent, failed = sent + done[0], failed + done[1]
        if rows and (stopping() or monotonic() >= until):
            _record(db, outbox.Record(again=[row.id for row in rows]))
            break
        if rows:
            loaded, texts = in_transaction(db, functools.partial(outbox.load, table=table, rows=rows))
    return sent, failed


def sends_until() -> float:
    """Return the `monotonic()` at which who claims messages now stops to send them: when half of the lease is over."""
    return monotonic() + outbox.LEASE_S / 2


def _item(row: outbox.Row, texts: dict[int, str]) -> Item:
    kept_on = row.nesting is not None
    return Item(row.id, row.task_id, row.task, lambda: from_text(texts[row.id], row.expires_at), kept=kept_on)
