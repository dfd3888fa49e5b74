"""A message that is delivered again after it has expired, or was revoked.

Celery's main process would revoke it, whatever has become of the delivery before: its result would be REVOKED while the
task goes on, or when its work is committed, and its chord would fail. The pool process knows better: what has completed
is returned, what runs is waited for, and the rest is revoked as Celery does it.
"""

from __future__ import annotations

import functools
import logging
from datetime import UTC, datetime
from typing import Any, NoReturn

from celery.exceptions import Ignore
from celery.signals import task_revoked
from celery.utils.time import maybe_iso8601, maybe_make_aware

from .._celery import is_result_ignored
from ..pausing import without_blocking

logger: logging.Logger = logging.getLogger(__name__)

REVOKED = "celery_alchemy_revoked"
"""Key in what Celery's main process sends to the pool process, of a request that was revoked."""


def is_redelivered(request: Any) -> bool:
    """Tell whether the broker says that it has delivered the message of `request` before."""
    return bool((request.delivery_info or {}).get("redelivered"))


def why(task: Any, request: Any) -> str | None:
    """Return why `request`, which is delivered again, is not to begin: "revoked" or "expired"; None: it may."""
    if REVOKED in request.__dict__:
        return "revoked"
    return "expired" if _has_expired(task, request) else None


def _has_expired(task: Any, request: Any) -> bool:
    """Tell whether `request` is delivered again, and was to begin by now."""
    if not request.expires or not is_redelivered(request):
        return False
    expires: datetime = maybe_make_aware(maybe_iso8601(request.expires), task.app.timezone)
    return datetime.now(UTC) > expires


def revoke(task: Any, request: Any, reason: str) -> NoReturn:
    """End `request`, which has expired or was revoked, as Celery's main process does.

    Raises:
        Ignore: always.
    """
    logger.info("%s[%s] is %s, and no other delivery of it runs or has completed", task.name, request.id, reason)
    is_stored = not is_result_ignored(task, request) or task.store_errors_even_if_ignored
    store = functools.partial(task.backend.mark_as_revoked, request.id, reason, request, is_stored)
    without_blocking(store)
    is_expired = reason == "expired"
    task_revoked.send(sender=task, request=request, terminated=False, signum=None, expired=is_expired)
    raise Ignore(f"It is {reason}")
