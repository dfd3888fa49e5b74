"""Waiting for a time, whatever runs the task."""

from __future__ import annotations

import asyncio
import time

from sqlalchemy.util import await_only

from ..strategies.scope import runs_in_greenlet


def pause(seconds: float) -> None:
    """Wait for so many seconds. On an event loop the other tasks go on meanwhile."""
    if runs_in_greenlet():
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)
