"""Time limits of tasks on an event loop."""

from __future__ import annotations

import asyncio

from celery.exceptions import SoftTimeLimitExceeded

from ..strategies.asynchronous.hosting import Interruption


class SoftLimit(SoftTimeLimitExceeded, asyncio.CancelledError):  # type: ignore[misc]
    """A soft time limit at an `await`: to libraries a cancellation, to the task's code Celery's exception."""


def new_interruption() -> Interruption:
    """Return what may stop one task request."""
    return Interruption(SoftLimit)
