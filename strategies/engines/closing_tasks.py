"""Asyncio tasks that close connections: the end of an event loop waits for them, and does not cut them short."""

from __future__ import annotations

import asyncio

CUT_S = 2.0
"""Seconds that a cancellation waits for the end of such a task."""


class ClosingTask(asyncio.Task[None]):
    """Closes connections. A cancellation waits `CUT_S` seconds for its end: `asyncio.run()` cancels all tasks when its
    coroutine has returned, and a driver that is cut short in its goodbye logs an error with a traceback."""

    def cancel(self, msg: object = None) -> bool:
        """Cancel it in `CUT_S` seconds, unless it has ended by then."""
        if self.done():
            return False
        self.get_loop().call_later(CUT_S, super().cancel, msg)
        return True
