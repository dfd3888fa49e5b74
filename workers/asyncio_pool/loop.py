"""The event loop of the worker pool, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from celery.exceptions import WorkerShutdown

logger: logging.Logger = logging.getLogger(__name__)

START_S = 30.0
END_S = 5.0
"""Seconds for what is left when the worker ends: children of tasks, async generators, connections that are closed."""


class LoopThread:
    """Runs an event loop until `stop`.

    Args:
        begun: Called on the loop first.
    """

    def __init__(self, begun: Callable[[], None]) -> None:
        self.loop: asyncio.AbstractEventLoop = asyncio.new_event_loop()
        self.closers: list[Callable[[], Awaitable[Any]]] = []
        """Awaited when the loop ends: what closes the connections that were opened on it."""
        self._stopping = False
        self._started = threading.Event()
        self._begun = begun
        self._error: BaseException | None = None
        self.thread: threading.Thread = threading.Thread(target=self._run, name="asyncio-pool", daemon=True)

    def start(self) -> None:
        self.thread.start()
        if not self._started.wait(START_S) or self._error is not None:
            raise RuntimeError("The event loop of the worker pool did not start") from self._error

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call `function` on the loop soon, from any thread; where the loop has ended, not at all."""
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("The event loop has ended: %r is not called", function)

    def stop(self, wait_s: float) -> bool:
        """End the loop; return whether it has ended. A coroutine that blocks it is waited for no longer than that."""
        if self.thread.is_alive():
            self.call(self._stop)
            self.thread.join(wait_s)
        return not self.thread.is_alive()

    def _stop(self) -> None:
        self._stopping = True
        self.loop.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(self._begin)
        while not self._stopping:
            try:
                self.loop.run_forever()
            except (SystemExit, KeyboardInterrupt, WorkerShutdown) as error:  # asyncio lets them through
                logger.error("A coroutine that a task had started raised %r: the event loop goes on", error)
        try:
            self.loop.run_until_complete(self._close())
        except BaseException:
            logger.exception("The event loop of the worker pool did not end well")
        self.loop.close()

    def _begin(self) -> None:
        try:
            self._begun()
        except BaseException as error:
            self._error = error
        self._started.set()

    async def _close(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=END_S)
        for closer in self.closers:
            try:
                await asyncio.wait_for(closer(), END_S)
            except Exception:
                logger.exception("Connections of the event loop were not closed well")
        await asyncio.wait_for(self.loop.shutdown_asyncgens(), END_S)
