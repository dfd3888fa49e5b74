"""Requests that end without completing: the outbox is not to send their messages again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from celery.exceptions import Reject, Retry
from celery.signals import task_failure, task_retry
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ...strategies.errors import CeleryAlchemyError
from ...strategies.features import outbox_kept
from ...strategies.features.completed import Key
from ..apps import Served
from ..request import request_of
from ..sending.kept import resend_s
from ..sending.sender import in_transaction, table_of
from .following import outbox_of
from .ids import key_of

logger: logging.Logger = logging.getLogger(__name__)

_UID = "celery_alchemy.exactly_once"


def connect() -> None:
    """Let the outbox know of tasks that fail, and that are tried again."""
    task_failure.connect(_failed, weak=False, dispatch_uid=_UID)
    task_retry.connect(_retried, weak=False, dispatch_uid=_UID)


def predicate(task: Any, request: Any, error: BaseException) -> None:
    """`request` has ended with Ignore or Reject, and has recorded nothing."""
    if not isinstance(error, Retry) and not (isinstance(error, Reject) and error.requeue):
        _change(task, request, lambda session, table, key, db: outbox_kept.drop_of(session, table, key))


def _failed(sender: Any = None, **_: Any) -> None:
    _change(sender, request_of(sender), lambda session, table, key, db: outbox_kept.drop_of(session, table, key))


def _retried(sender: Any = None, request: Any = None, reason: Any = None, **_: Any) -> None:
    def change(session: Session, table: Any, key: Key, db: Served) -> None:
        outbox_kept.postpone(session, table, key, _in_s(getattr(reason, "when", None)) + resend_s(db))

    _change(sender, request, change)


def _in_s(when: Any) -> float:
    """Return in how many seconds a retry is due."""
    if isinstance(when, datetime):
        return max(0.0, when.timestamp() - time.time())
    return float(when or 0.0)


def _change(task: Any, request: Any, change: Callable[[Session, Any, Key, Served], object]) -> None:
    db = outbox_of(task)
    if db is None or request is None or request.called_directly or request.is_eager or not db.records(task.name):
        return
    table, key = table_of(db), key_of(request)
    try:
        in_transaction(db, lambda session: change(session, table, key, db))
    except (SQLAlchemyError, CeleryAlchemyError) as error:
        logger.warning("%s[%s] has ended, and may be sent again by the outbox: %s", task.name, request.id, error)
