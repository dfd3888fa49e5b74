"""The exception of a soft time limit in a coroutine."""

from __future__ import annotations

import asyncio

from celery.exceptions import SoftTimeLimitExceeded


class SoftLimit(SoftTimeLimitExceeded, asyncio.CancelledError):  # type: ignore[misc]
    """Raised at the `await`: the task's code catches it as Celery's SoftTimeLimitExceeded, libraries clean up as after
    any cancellation."""
