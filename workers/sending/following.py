"""What a message waits for where no unit of work is open: the Session of a web request, or nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from celery import Celery

from ...strategies.engines.leaks import Origin, describe, find_origin
from ...strategies.errors import NoUnitOfWork
from ...strategies.features.following import followed, is_committed
from ...strategies.features.foreign_sessions import plain_session
from .. import apps
from .._celery import running_request
from ..settings import read_on_commit_outside
from ..sharing import is_of_thread
from . import failed_requests

logger: logging.Logger = logging.getLogger(__name__)

_MOST_PLACES = 1000
#: Places that were warned of, and what was called there.
_told: set[tuple[Origin, str]] = set()


def session_to_wait_for(app: Celery, what: str, first: apps.Served | None = None) -> Any:
    """Return the Session whose COMMIT `what`, called outside a unit of work, waits for; None: it is done at once.

    A `db.follow()` block comes first, then a shared `scoped_session`. Its Session is made where there is none yet: the
    caller says that a COMMIT is to come, and a web request may register a message before its first statement. There is
    nothing to wait for where the `scoped_session` has no Session to give (Flask-SQLAlchemy's, outside an application
    context); and in a plain task where it has one for each thread and no transaction is open, for a thread of a worker
    goes on after the task, and its Session may never be closed.

    Args:
        first: The Alchemy whose shared scoped_sessions are looked at first; of the default database if left out.
    Raises:
        NoUnitOfWork: there is none, and `alchemy_on_commit_outside` is "raise".
        UnseenBlock: a `db.follow()` block is open that the code it is for cannot see.
    """
    failed_requests.watch()
    session = followed()
    if session is not None:
        return session
    if is_committed():
        return None
    candidates = list(_shared(app, first))
    if not candidates:
        _nothing_to_wait_for(app, what)
    return next((session for session in candidates if session.in_transaction()), candidates[0] if candidates else None)


def open_session(app: Celery) -> Any:
    """Return the followed or shared Session if it is in a transaction; None where there is none, or it is not.

    For what is sent by `delay()` with `alchemy_enqueue_on_commit`: it waits for what is open, and what is sent before
    a transaction has begun is no part of it.

    Raises:
        UnseenBlock: as `session_to_wait_for` does.
    """
    failed_requests.watch()
    session = followed(settle=False)
    if session is not None:
        return session if plain_session(session).in_transaction() else None
    if is_committed():
        return None
    return next(_shared(app, only_open=True), None)


def _shared(app: Celery, first: apps.Served | None = None, *, only_open: bool = False) -> Iterator[Any]:
    """Yield the Sessions of the shared scoped_sessions.

    Args:
        first: As of `session_to_wait_for`.
        only_open: Only those that are in a transaction.
    """
    first = first or apps.find(app)
    known = [db for db in apps.databases(app).values() if db is not first]
    for db in [first, *known] if first is not None else known:
        for sessions in db.shared:
            must_be_open = only_open or (running_request() is not None and is_of_thread(sessions))
            try:
                found = sessions() if not must_be_open or sessions.registry.has() else None
            except Exception:  # noqa: S112 - it has none to give here: Flask-SQLAlchemy's wants an application context
                continue
            if found is not None and (found.in_transaction() or not must_be_open):
                yield found


def _nothing_to_wait_for(app: Celery, what: str) -> None:
    policy = read_on_commit_outside(app)
    if policy == "send":
        return
    origin = find_origin(("celery.",))
    why = (
        f"{what} at {describe(origin)} has no COMMIT to wait for: no unit of work is open there, no Session is "
        f"followed, and no scoped_session is shared that has a Session there"
    )
    remedy = (
        "In a web request, follow its Session (`with db.follow(session):`), share its scoped_session "
        "(`db.share(...)`), or pass session=; in a script, use `with db.unit_of_work():`."
    )
    if policy == "raise":
        raise NoUnitOfWork(f"{why}. Nothing was sent, for alchemy_on_commit_outside is 'raise'. {remedy}")
    if (origin, what) in _told:
        return
    if len(_told) < _MOST_PLACES:
        _told.add((origin, what))
    logger.warning(
        "%s; it was done at once. %s If at once is right, set alchemy_on_commit_outside = 'send'. This is said once "
        "for each place.", why, remedy,
    )  # fmt: skip
