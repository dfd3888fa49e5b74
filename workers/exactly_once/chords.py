"""A member of a chord that is delivered again: the body of the chord may never have been sent.

With the Redis backend of Celery 5.7 the last member takes a lease and sends the body. If it is killed in between, the
member that is delivered again finds the lease taken and is acknowledged: the body never comes. So the lease is let go
before the member is counted again. A body that is sent twice has the same id both times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import VERSION, Celery

from ..errors import ConfigurationError

CLAIM = ".c"
"""Ends the key of the lease, of Celery 5.7's Redis backend; earlier versions have none."""
DONE = b"done"
COUNTS_BY_ID = (5, 7)
"""From this version of Celery on each member counts once, whatever it keeps."""


def let_claim_go(task: Any, request: Any) -> None:
    """Let another member of the chord of `request` send its body, if no member has finished that."""
    backend = task.backend
    if not request.chord or not request.group or not _is_redis(backend):
        return
    key = backend.get_key_for_group(request.group, CLAIM)
    claim = backend.client.get(key)
    if claim is not None and claim not in (DONE, DONE.decode()):
        backend.client.delete(key)


def refuse_counting_twice(app: Celery, has_any: Callable[[], bool]) -> None:
    """Refuse a Redis backend that counts a member of a chord each time that it is delivered: before Celery 5.7, one
    that keeps no order. Ordered, it keeps each result once.

    Args:
        has_any: Tells whether a task has `exactly_once`.
    Raises:
        ConfigurationError: it does so.
    """
    options = app.conf.get("result_backend_transport_options") or {}
    ordered = options.get("result_chord_ordered", True)
    if ordered or VERSION[:2] >= COUNTS_BY_ID or not has_any() or not _is_redis(app.backend):
        return
    raise ConfigurationError(
        f"result_backend_transport_options has result_chord_ordered={ordered!r}, and tasks have exactly_once. Celery "
        f"{'.'.join(map(str, VERSION[:3]))} would then count a member of a chord once for each delivery, and call the "
        f"chord's body before all members have ended. Leave result_chord_ordered out, or use Celery 5.7."
    )


def _is_redis(backend: Any) -> bool:
    return any(kind.__module__ == "celery.backends.redis" for kind in type(backend).__mro__)
