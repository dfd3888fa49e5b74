"""What a task with `exactly_once` sends itself, and what Celery sends for it after its end.

The ids of what the body sends are made of the task's own id and of the place: the name of the task that is sent, its
arguments, and how many such messages the body has sent before. So a body that runs again, and sends the same in another
order, gives each message the same id; one that sends something else gives that another id.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from kombu.exceptions import EncodeError
from kombu.utils import json

from ...strategies.errors import CeleryAlchemyError
from ...strategies.features.exactly_once import ATTEMPT, Attempt
from ...strategies.interrupts import is_interrupt
from ...strategies.registry import open_entries
from .._celery import running_requests
from ..apps import Served
from ..request import is_over
from ..sending import enqueue
from .ids import derived

logger: logging.Logger = logging.getLogger(__name__)

_COUNTS = "_celery_alchemy_once_sent"
"""In the `__dict__` of a request: how many messages of each kind its body has sent."""
_INSTALLED = "_celery_alchemy_once_sends"


def begin(request: Any) -> None:
    """The body of `request` begins, for the first time or once more."""
    request.__dict__[_COUNTS] = Counter()


def install(db: Served) -> None:
    """Let what tasks with `exactly_once` of the app of `db` send pass through here, once."""
    app = db.app
    if _INSTALLED not in app.__dict__:
        app.__dict__[_INSTALLED] = True
        enqueue.surround(app, functools.partial(_send, db))


def _send(db: Served, send: Callable[..., Any], name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
    request = next((one for one in reversed(running_requests()) if not one.called_directly), None)
    attempt = request.__dict__.get(ATTEMPT) if request is not None else None
    if attempt is None or enqueue.is_decided():
        return send(name, args, kwargs, **options)
    if any(entry.request is request and entry.kind in {"run", "call"} for entry in open_entries()):
        _in_body(db, attempt, request, name, args, kwargs, options)
    elif is_over(request) and db.settings.outbox and not open_entries():
        return _after_body(db, send, name, args, kwargs, options)
    return send(name, args, kwargs, **options)


def _in_body(
    db: Served, attempt: Attempt, request: Any, name: str, args: Any, kwargs: Any, options: dict[str, Any]
) -> None:
    if not options.get("task_id"):
        place = _place(request, name, args, kwargs)
        if place is not None:
            options["task_id"] = derived(attempt.key, "sent", *place)
    asked = options.get(enqueue.OPTION)
    if asked is None:
        asked = getattr(options.get("task_type"), enqueue.OPTION, None)
    if asked is None and db.settings.outbox and db.units.is_open() and db.units.current().commits:
        options[enqueue.OPTION] = True


def _place(request: Any, name: str, args: Any, kwargs: Any) -> tuple[object, ...] | None:
    try:
        text = json.dumps((args or (), kwargs or {}), sort_keys=True)
    except (TypeError, ValueError, EncodeError, RecursionError, CeleryAlchemyError):
        return None  # made late, or not JSON: a new id
    what = (name, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())
    counts = request.__dict__.setdefault(_COUNTS, Counter())
    counts[what] += 1
    return *what, counts[what] - 1


def _after_body(
    db: Served, send: Callable[..., Any], name: str, args: Any, kwargs: Any, options: dict[str, Any]
) -> Any:
    """Send the body of a chord, or an errback, by way of the outbox: a broker that loses it gets it again."""
    try:
        return enqueue.store_now(db, name, args, kwargs, options)
    except Exception as error:
        if is_interrupt(error):
            raise
        logger.warning("%s could not be put into the outbox, and is sent without it", name, exc_info=True)
        return send(name, args, kwargs, **options)
