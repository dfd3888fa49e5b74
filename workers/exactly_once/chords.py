"""A member of a chord that is delivered again: the body of the chord may never have been sent.

With the Redis backend of Celery 5.7 the last member takes a lease and sends the body. If it is killed in between, the
member that is delivered again finds the lease taken and is acknowledged: the body never comes. So the lease is let go
before the member is counted again. A body that is sent twice has the same id both times.
"""

from __future__ import annotations

from typing import Any

CLAIM = ".c"
"""Ends the key of the lease, of Celery 5.7's Redis backend; earlier versions have none."""
DONE = b"done"


def let_claim_go(task: Any, request: Any) -> None:
    """Let another member of the chord of `request` send its body, if no member has finished that."""
    backend = task.backend
    if not request.chord or not request.group or not _is_redis(backend):
        return
    key = backend.get_key_for_group(request.group, CLAIM)
    claim = backend.client.get(key)
    if claim is not None and claim not in (DONE, DONE.decode()):
        backend.client.delete(key)


def _is_redis(backend: Any) -> bool:
    return any(kind.__module__ == "celery.backends.redis" for kind in type(backend).__mro__)
