"""The event loop of the worker pool, in a thread of its own; it is the one of the process."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from ...strategies.asynchronous import loop_thread

logger: logging.Logger = logging.getLogger(__name__)

START_S = 30.0
END_S = 5.0
"""Seconds for what is left when the worker ends: children of tasks, async generators, connections that are closed."""


class WorkerLoop(loop_thread.LoopThread):
    """Runs an event loop until `end`.

    Args:
        begun: Called on the loop first.
        closing: Awaited on it last: what closes the connections that were opened on it.
    """

    def __init__(self, begun: Callable[[], None], closing: Callable[[], Awaitable[None]]) -> None:
        self._begun, self._closing = begun, closing
        self._ending = False
        self._started = threading.Event()
        self._error: BaseException | None = None
        super().__init__()

    def begin(self) -> None:
        """Wait until it runs; what needs the loop of the process gets this one.

        Raises:
            RuntimeError: it does not.
        """
        self.call(self._begin)
        if not self._started.wait(START_S) or self._error is not None:
            raise RuntimeError("The event loop of the worker pool did not start") from self._error
        loop_thread.use(self)

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call `function` on the loop soon, from any thread; where the loop has ended, not at all."""
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("The event loop has ended: %r is not called", function)

    @property
    def is_alive(self) -> bool:
        """It has not ended."""
        return self._thread.is_alive()

    def end(self, wait_s: float) -> bool:
        """End the loop; return whether it has ended. A coroutine that blocks it is waited for no longer than that."""
        loop_thread.use(None)
        if self.is_alive:
            self.call(self._end)
            self._thread.join(wait_s)
        return not self.is_alive

    def _end(self) -> None:
        self._ending = True
        self.loop.stop()

    def _begin(self) -> None:
        try:
            self._begun()
        except BaseException as error:
            self._error = error
        self._started.set()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        while not self._ending:
            try:
                self.loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as error:  # asyncio lets them through
                logger.error("A coroutine that a task had started raised %r: the event loop goes on", error)
        try:
            self.loop.run_until_complete(self._close())
        except BaseException:
            logger.exception("The event loop of the worker pool did not end well")
        self.loop.close()

    async def _close(self) -> None:
        await loop_thread.end_well(END_S)
        await asyncio.wait_for(self._closing(), END_S)
