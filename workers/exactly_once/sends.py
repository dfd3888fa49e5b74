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
from sqlalchemy.engine import Connection

from ...strategies.errors import CeleryAlchemyError
from ...strategies.features import outbox_kept
from ...strategies.features.completed import Key
from ...strategies.features.exactly_once import ATTEMPT, Attempt
from ...strategies.features.on_event_loop import run_in_thread
from ...strategies.interrupts import is_interrupt
from ...strategies.registry import open_entries
from ...strategies.scope import runs_in_greenlet
from .._celery import running_requests
from ..apps import Served
from ..request import is_over
from ..sending import enqueue, outbox
from ..sending.sender import table_of
from .ids import derived

logger: logging.Logger = logging.getLogger(__name__)

_COUNTS = "_celery_alchemy_once_sent"
"""In the `__dict__` of a request: how many messages of each kind its body has sent."""
_REPEATED = "_celery_alchemy_once_repeated"
"""In the `__dict__` of a request: its task is recorded, and its body does not run."""
HELD = "_celery_alchemy_once_held"
"""In the `__dict__` of a request: what sends its retry, once Celery has stored the state RETRY. Sent before, the retry
may end first, and its result be overwritten."""
_INSTALLED = "_celery_alchemy_once_sends"


def begin(request: Any) -> None:
    """The body of `request` begins, for the first time or once more."""
    request.__dict__[_COUNTS] = Counter()


def repeats(request: Any) -> None:
    """The task of `request` is recorded: what Celery sends for it from now on comes after its end, as of the first
    one."""
    request.__dict__[_REPEATED] = True


def is_ours(request: Any) -> bool:
    """Tell whether `request` is one of a task with `exactly_once`: its body has begun, or it is recorded."""
    return ATTEMPT in request.__dict__ or _REPEATED in request.__dict__


def install(db: Served) -> None:
    """Let what tasks with `exactly_once` of the app of `db` send pass through here, once."""
    app = db.app
    if _INSTALLED not in app.__dict__:
        app.__dict__[_INSTALLED] = True
        enqueue.surround(app, functools.partial(_send, db))


def _send(db: Served, send: Callable[..., Any], name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
    request = _running()
    if request is None or enqueue.is_decided():
        return send(name, args, kwargs, **options)
    if not is_ours(request):
        return send(name, args, kwargs, **options)
    attempt, repeated = request.__dict__.get(ATTEMPT), _REPEATED in request.__dict__
    if db.settings.outbox and _is_retry(request, options):
        held = request.__dict__.setdefault(HELD, [])
        return _by_outbox(db, send, name, args, kwargs, options, _Retry, held)
    if attempt is not None and _is_in_body(request):
        _in_body(db, attempt, request, name, args, kwargs, options)
    elif (repeated or is_over(request)) and db.settings.outbox and not open_entries():
        return _by_outbox(db, send, name, args, kwargs, options)
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
    if asked is None and _waits(db):
        options[enqueue.OPTION] = True


def waits_here(db: Served) -> bool:
    """Tell whether what is sent here waits for the COMMIT because it is the body of a task with `exactly_once`."""
    request = _running()
    if request is None or enqueue.is_decided() or ATTEMPT not in request.__dict__:
        return False
    return _is_in_body(request) and _waits(db)


def _running() -> Any:
    return next((one for one in reversed(running_requests()) if not one.called_directly), None)


def _is_in_body(request: Any) -> bool:
    return any(entry.request is request and entry.kind in {"run", "call"} for entry in open_entries())


def _waits(db: Served) -> bool:
    return bool(db.settings.outbox) and db.units.is_open() and db.units.current().commits


def _place(request: Any, name: str, args: Any, kwargs: Any) -> tuple[object, ...] | None:
    try:
        text = json.dumps((args or (), kwargs or {}), sort_keys=True)
    except (TypeError, ValueError, EncodeError, RecursionError, CeleryAlchemyError):
        return None  # made late, or not JSON: a new id
    what = (name, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())
    counts = request.__dict__.setdefault(_COUNTS, Counter())
    counts[what] += 1
    return *what, counts[what] - 1


def _is_retry(request: Any, options: dict[str, Any]) -> bool:
    """Tell whether a message is the next attempt of `request`, which has been rolled back for it."""
    return options.get("task_id") == request.id and (options.get("retries") or 0) > (request.retries or 0)


class _Retry(outbox.Stored):
    """The message of a retry. The outbox sends the one of the attempt before no more: this one is kept in its place."""

    __slots__ = ()

    def __call__(self) -> None:
        if runs_in_greenlet() and not self._db.strategy.awaits:
            run_in_thread(super().__call__)  # a statement in the body of a coroutine would stop its event loop
        else:
            super().__call__()

    def write(self, connection: Connection) -> None:
        if self.row.nesting is not None:
            outbox_kept.drop_of(connection, table_of(self._db), [Key(self.row.task_id, self.row.nesting)])


def _by_outbox(
    db: Served,
    send: Callable[..., Any],
    name: str,
    args: Any,
    kwargs: Any,
    options: dict[str, Any],
    kind: type[outbox.Stored] = outbox.Stored,
    held: list[outbox.Delivery] | None = None,
) -> Any:
    """Send a retry, the body of a chord or an errback by way of the outbox, in a transaction of its own: a broker that
    loses it gets it again."""
    try:
        return enqueue.store_now(db, name, args, kwargs, options, kind, held)
    except Exception as error:
        if is_interrupt(error):
            raise
        logger.warning("%s could not be put into the outbox, and is sent without it", name, exc_info=True)
        return send(name, args, kwargs, **options)
