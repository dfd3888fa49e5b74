"""What is lost when a Session is closed: work that waits to be written, or was written and not committed."""

from __future__ import annotations

import logging

from sqlalchemy.orm import Session

from ._sqlalchemy import connections_of, has_changes
from .drivers.base import driver_of
from .engines.leaks import describe, find_origin
from .errors import SessionClosedEarly
from .interrupts import is_interrupt

logger: logging.Logger = logging.getLogger(__name__)


def place_of_loss(session: Session, label: str, commits: bool) -> str | None:
    """Return the line of code that closes `session` now, where that loses work; None where it does not.

    A unit of work that commits nothing by itself, called `label`, loses it with a warning.
    """
    if not loses_work(session):
        return None
    place = describe(find_origin())
    if commits:
        return place
    logger.warning(
        "%s: its Session was closed at %s with uncommitted changes, and commit_on_success is False: they are rolled "
        "back", label, place,
    )  # fmt: skip
    return None


def error_for(label: str, place: str) -> SessionClosedEarly:
    """Return the error of the unit of work `label`, whose Session was closed at `place`, with work in it."""
    return SessionClosedEarly(
        f"{label}: its Session was closed at {place} with work in it that was not committed; that work is rolled back. "
        f"Leave the close out (and `with` around the Session, remove(), reset()): the Session is closed when its unit "
        f"of work ends, after the COMMIT. Or call commit() before."
    )


def loses_work(session: Session) -> bool:
    """Tell whether to close `session` now loses anything. May ask the server: a round trip.

    A transaction that has failed has nothing to lose: to close it is to roll it back.
    """
    if not session.is_active:
        return False
    connections = [connection for connection in connections_of(session) if not connection.invalidated]
    if any(driver_of(one.dialect).transaction_failed(one.connection.dbapi_connection) for one in connections):
        return False
    if has_changes(session) and (session.new or session.deleted or any(map(session.is_modified, session.dirty))):
        return True
    written = getattr(session, "may_have_written", True)
    for connection in connections:
        told: bool | None = None
        try:
            told = driver_of(connection.dialect).has_written(connection)
        except Exception as error:
            if is_interrupt(error):
                raise
        if written if told is None else told:
            return True
    return False
