"""What Celery itself sends, which never waits: retries, replacements, links, chain, chord and error callbacks.

A retry that waited for a COMMIT would be dropped by the rollback that a retry is: its task would be in RETRY for ever.
A message is Celery's own by its id, for Celery names what belongs to a request, or because a method of the task sends
it whose messages are all of this kind.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ...strategies.registry import open_entries
from .._celery import running_request, running_requests
from ..request import is_over

#: Of a task: all that they send is Celery's own. `add_to_chord` makes the chord wait for one more message.
METHODS = ("retry", "replace", "on_replace", "add_to_chord")
_MARK = "_celery_alchemy_sent_by_celery"
#: The request in which such a method runs, or True outside of any. A task that is run inside it (the replacement of an
#: eager task) has a request of its own, and what that sends is its own code's.
_sending: ContextVar[Any] = ContextVar("celery_alchemy_sent_by_celery", default=None)


@contextmanager
def sent_by_celery() -> Iterator[None]:
    """Let what the block sends go at once."""
    token = _sending.set(running_request() or True)
    try:
        yield
    finally:
        _sending.reset(token)


def mark_methods(cls: type) -> None:
    """Let what `METHODS` of the task class `cls` send go at once, whoever has written them."""
    for name in METHODS:
        raw = inspect.getattr_static(cls, name)
        if inspect.isfunction(raw) and getattr(raw, _MARK, None) is not raw:
            setattr(cls, name, _marked(raw))


def _marked(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def send(*args: Any, **kwargs: Any) -> Any:
        with sent_by_celery():
            return method(*args, **kwargs)

    setattr(send, _MARK, send)  # a decorator that copies our attributes (functools.wraps) is none of ours
    return send


def is_celerys_own(options: Mapping[str, Any]) -> bool:
    """Tell whether a message is Celery's own.

    Args:
        options: Of `apply_async`.
    """
    request = running_request()
    if _sending.get() is (request or True):
        return True
    if request is None:
        return False
    ids = {id_ for one in running_requests() for id_ in (one.id, _id_of(one.chord)) if id_ is not None}
    if options.get("task_id") in ids or _id_of(options.get("chord")) in ids:
        return True
    if any(entry.request is request for entry in open_entries()):
        return False
    # The tracer sends links, the chain and error callbacks when the request has left its unit of work. It names this
    # request as their parent, where user code leaves that to Celery.
    return is_over(request) or options.get("parent_id", "") == request.id


def _id_of(chord: Any) -> Any:
    """Return the id of the body of `chord`, an option of a message or a field of a request."""
    return (chord.get("options") or {}).get("task_id") if isinstance(chord, Mapping) else None
