"""A task with `exactly_once` that commits before its end: what would be lost with its worker.

Its work is committed, and not done again. But its result is known only when it returns: a worker that is killed in
between takes it along. So such a COMMIT is refused where anything would be done with the result.
"""

from __future__ import annotations

from typing import Any

from celery.backends.base import DisabledBackend

from .._celery import is_result_ignored


def refusal(task: Any, request: Any) -> str | None:
    """Return what needs the result of `request`, for a message; None: it may commit before its end."""
    if not _what_follows(request) and not request.errbacks:
        return None
    if needs_no_result(task, request):
        return None
    return "links, errbacks, the rest of a chain or the body of a chord come after it"


def needs_no_result(task: Any, request: Any) -> bool:
    """Tell whether all goes on as well without the result of `request`: it is kept nowhere, and passed to nothing."""
    is_kept = not is_result_ignored(task, request) and not isinstance(task.backend, DisabledBackend)
    return not is_kept and all(one.get("immutable") for one in _what_follows(request))


def _what_follows(request: Any) -> list[Any]:
    following = [request.chain[-1]] if request.chain else []
    return [*(request.callbacks or ()), *following, *([request.chord] if request.chord else [])]
