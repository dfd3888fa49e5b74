"""Waiting, for a time or for a server, whatever runs the task."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from sqlalchemy.util import await_only

from ..strategies.features.on_event_loop import run_in_thread
from ..strategies.scope import runs_in_greenlet


def pause(seconds: float) -> None:
    """Wait for so many seconds. On an event loop the other tasks go on meanwhile."""
    if runs_in_greenlet():
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


def without_blocking(function: Callable[[], None]) -> None:
    """Call `function`, which talks to a server; on an event loop in a thread, so that the other tasks go on."""
    if runs_in_greenlet():
        run_in_thread(function)
    else:
        function()
