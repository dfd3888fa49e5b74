"""Time limits of tasks on an event loop."""

from __future__ import annotations

import asyncio

from celery.exceptions import SoftTimeLimitExceeded

from ..strategies.asynchronous.hosting import Killed
from ..strategies.errors import BodyCancelled


class SoftLimit(SoftTimeLimitExceeded, asyncio.CancelledError):  # type: ignore[misc]
    """A soft time limit at an `await`: to libraries a cancellation, to the task's code Celery's exception."""


def soft_limit(seconds: float | None) -> SoftLimit:
    """Return what an `Interruption` of a task request raises for a soft time limit."""
    return SoftLimit() if seconds is None else SoftLimit(seconds)


def as_celerys(error: BaseException, name: str) -> BaseException:
    """Return what Celery is to see instead of `error`, which has left the body of the task `name`.

    To a tracer that is not awaited, a CancelledError says nothing: it would neither store a result nor acknowledge.
    """
    if isinstance(error, SoftTimeLimitExceeded):
        limit: BaseException = SoftTimeLimitExceeded(*error.args)
        return limit.with_traceback(error.__traceback__)
    if isinstance(error, Killed):
        return error
    return BodyCancelled(
        f"{name} was cancelled: its code has cancelled its own asyncio task, or awaits something that was cancelled. "
        f"Catch asyncio.CancelledError where that is expected."
    ).with_traceback(error.__traceback__)
