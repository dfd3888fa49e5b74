"""Requests that have ended, in whatever way: the outbox is not to send their messages again."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from celery import states
from celery.exceptions import Reject, Retry, WorkerLostError
from celery.signals import task_failure, task_retry, task_revoked, task_success
from sqlalchemy import Table
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ...strategies.errors import CeleryAlchemyError
from ...strategies.features import outbox_kept
from ...strategies.features.completed_table import recorded_id
from ..apps import Served
from ..pausing import without_blocking
from ..request import request_of
from ..sending.kept import resend_s
from ..sending.received import received
from ..sending.sender import in_transaction, table_of
from .chords import cut_claim, see_body_sent
from .following import outbox_of
from .ids import key_of
from .sends import HELD, is_ours

logger: logging.Logger = logging.getLogger(__name__)

_UID = "celery_alchemy.exactly_once"


def connect() -> None:
    """Let the outbox know of tasks that have ended, and that are tried again."""
    follow_members()
    task_retry.connect(_retried, weak=False, dispatch_uid=_UID)
    task_revoked.connect(_revoked, weak=False, dispatch_uid=_UID)


def follow_members() -> None:
    """See that a chord's body, or its errbacks, are sent before its members end, with an outbox or without."""
    task_success.connect(_succeeded, weak=False, dispatch_uid=_UID)
    task_failure.connect(_failed, weak=False, dispatch_uid=_UID)


def predicate(task: Any, request: Any, error: BaseException, *, committed: bool) -> None:
    """`request` ends with Ignore, Reject or Retry."""
    if isinstance(error, Retry):
        return  # which is still to be stored
    _send_retry(request)
    if isinstance(error, Reject) and error.requeue:
        return
    if committed:
        ended(task, request)
    else:  # and would run again
        _drop(task, request)


def ended(task: Any, request: Any) -> None:
    """All that `request` does is done: a copy has nothing left to do."""
    db = _outbox_with_rows(task, request)
    if db is not None:
        received(db).add(key_of(request))


def _succeeded(sender: Any = None, result: Any = None, **_: Any) -> None:
    """Its result is stored, its chord has counted it, and what Celery sends after it is sent."""
    request = request_of(sender)
    _send_retry(request)  # of `self.retry(throw=False)`
    if request is not None and is_ours(request):
        see_body_sent(sender, request, states.SUCCESS, result)
    ended(sender, request)


def _failed(sender: Any = None, task_id: str = "", exception: Any = None, **_: Any) -> None:
    if isinstance(exception, WorkerLostError):
        return  # it is to be sent again
    request = request_of(sender)
    if request is not None and request.id == task_id and not request.called_directly:
        _send_retry(request)
        if is_ours(request):
            if (request.delivery_info or {}).get("redelivered"):  # the one before may have been killed with the lease
                without_blocking(functools.partial(cut_claim, sender, request))
            see_body_sent(sender, request, states.FAILURE, exception)
        _drop(sender, request)
    else:  # Celery's main process says so, which has not run it
        _drop_from_outside(sender, task_id)


def _revoked(sender: Any = None, request: Any = None, **_: Any) -> None:
    _drop_from_outside(sender, request.id)


def _drop_from_outside(task: Any, task_id: str) -> None:
    """The worker has ended a request, or not begun it: a hard time limit, a revoked or expired task."""
    db = outbox_of(task)
    if db is not None and db.records(task.name) and resend_s(db) > 0:
        recorded = recorded_id(str(task_id))
        _in_outbox(db, task, task_id, lambda session, table: outbox_kept.drop_all_of(session, table, recorded))


def _in_outbox(db: Served, task: Any, task_id: str, drop: Callable[[Session, Table], object]) -> None:
    table = table_of(db)
    try:
        in_transaction(db, lambda session: drop(session, table))
    except (SQLAlchemyError, CeleryAlchemyError) as error:
        logger.warning("%s[%s] has ended, and may be sent again by the outbox: %s", task.name, task_id, error)


def _retried(sender: Any = None, request: Any = None, **_: Any) -> None:
    _send_retry(request)  # it takes the place of the message that is tried again


def _send_retry(request: Any) -> None:
    """Send what `retry()` has put into the outbox."""
    for delivery in request.__dict__.pop(HELD, ()) if request is not None else ():
        without_blocking(delivery)


def _drop(task: Any, request: Any) -> None:
    db = _outbox_with_rows(task, request)
    if db is not None:
        key = key_of(request)
        _in_outbox(db, task, request.id, lambda session, table: outbox_kept.drop_of(session, table, [key]))


def _outbox_with_rows(task: Any, request: Any) -> Served | None:
    """Return the Alchemy whose outbox may have a row of `request`; None: none has."""
    if request is None or request.called_directly or request.is_eager:
        return None
    db = outbox_of(task)
    return db if db is not None and db.records(task.name) and resend_s(db) > 0 else None
