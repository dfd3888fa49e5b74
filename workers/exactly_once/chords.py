"""A member of a chord that is delivered again: the body of the chord may never have been sent.

With the Redis backend of Celery 5.7 the last member takes a lease and sends the body. If it is killed in between, the
member that is delivered again finds the lease taken and is acknowledged: the body never comes. So the lease is cut
short, and no member ends before the body is sent. A body that is sent twice has the same id both times.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from celery import VERSION, Celery
from celery.backends.base import Backend, DisabledBackend

from ..errors import ConfigurationError
from ..pausing import pause, without_blocking

CLAIM, SIZE = ".c", ".s"
"""End the keys of the lease and of the chord's size, of Celery 5.7's Redis backend; earlier versions have no lease."""
DONE = b"done"
CHORD_UNLOCK = "celery.chord_unlock"
"""Celery's own task, where the backend does not count: its message waits for the members, and sends the body."""
CUT_TO_S, LOOKS_EVERY_S = 1.0, 0.05
COUNTS_BY_ID = (5, 7)
"""From this version of Celery on each member counts once, whatever it keeps."""


def cut_claim(task: Any, request: Any) -> None:
    """Let another member of the chord of `request` send its body soon, if none has sent it by then.

    The lease is not deleted: without one, a chord looks as if members were missing.
    """
    client, claim, _ = _keys(task, request)
    if client is not None and not _is_done(client.get(claim)):
        client.pexpire(claim, int(1000 * CUT_TO_S))


def see_body_sent(task: Any, request: Any, state: str, result: Any) -> None:
    """Wait until the body of the chord of `request` is sent, or its errbacks are, where another member has the lease;
    take it where that does not send.

    Two copies of a member may run at a time, and with Redis kombu has one message for both: the acknowledgement of the
    one takes away the message of the other, which may be killed with the lease.

    Args:
        request: Its task has ended so, and is counted.
    """
    client, *keys = _keys(task, request)
    held = False
    while client is not None:
        found: list[Any] = []
        without_blocking(lambda: found.extend(client.mget(keys)))  # noqa: B023
        claim, size = found
        if size is None or _is_done(claim) or (claim is None and not held):
            return  # it is sent, or cannot be; or other members are still to come
        held = claim is not None
        if held:
            pause(LOOKS_EVERY_S)
        else:
            task.backend.on_chord_part_return(request, state, result)


def _keys(task: Any, request: Any) -> tuple[Any, str, str]:
    """Return the Redis client of a member's chord, and the keys of its lease and its size; no client for none."""
    backend = task.backend
    if not request.chord or not request.group or not _is_redis(backend):
        return None, "", ""
    claim, size = (backend.get_key_for_group(request.group, end) for end in (CLAIM, SIZE))
    return backend.client, claim, size


def polls_for_chords(backend: Any) -> bool:
    """Tell whether a result backend leaves chords to `celery.chord_unlock`."""
    if isinstance(backend, DisabledBackend):
        return False
    return getattr(backend.apply_chord, "__func__", None) is Backend.apply_chord


def _is_done(claim: Any) -> bool:
    return claim in (DONE, DONE.decode())


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
    of_redis = sys.modules.get("celery.backends.redis")  # not imported here: it needs the client, which may be missing
    # Under the worker pool asyncio another object stands for it.
    return of_redis is not None and isinstance(backend, of_redis.RedisBackend)
