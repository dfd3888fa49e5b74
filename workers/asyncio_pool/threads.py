"""Threads that do for the event loop what would block it."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from .starter import Starter

STALLED_S = 0.5
"""When the oldest work has waited for this time, every thread is stuck, and there are to be more of them."""


class _Work:
    """A call, and the future that a coroutine waits for."""

    __slots__ = ("context", "error", "function", "future", "result", "since")

    def __init__(self, function: Callable[[], Any], context: contextvars.Context, future: asyncio.Future[Any]) -> None:
        self.function, self.context, self.future = function, context, future
        self.since = time.monotonic()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.context.run(self.function)
        except BaseException as error:
            self.error = error

    def settle(self) -> None:
        """Tell who waits; called on the loop."""
        future, error = self.future, self.error
        if not future.done():
            if error is None:
                future.set_result(self.result)
            elif isinstance(error, StopIteration):  # a future takes it for the end of a generator
                future.set_exception(RuntimeError(f"StopIteration: {error}"))
            else:
                future.set_exception(error)
        self.future = self.error = self.result = None  # type: ignore[assignment]  # no cycle with the error's traceback


class Threads:
    """Daemon threads of one purpose, made when there is work for them: a thread that is stuck does not keep the
    process from ending, as one of `concurrent.futures` would.

    Args:
        starter: Makes them.
        eager: Up to so many, work never waits for a thread that another work has.
        most: Up to so many where `watch` finds that all are stuck.
    """

    def __init__(self, starter: Starter, loop: asyncio.AbstractEventLoop, name: str, eager: int, most: int) -> None:
        self._loop, self._name = loop, name
        self.starter: Starter = starter
        self.eager: int = eager
        self.most: int = max(eager, most)
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._waiting: deque[_Work] = deque()
        self._done: deque[_Work] = deque()
        self._told = False
        self._idle = 0
        self.count: int = 0
        """Threads there are."""
        self._lock = threading.Lock()

    def run(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """Call `function` in a thread, in a copy of the present context; called on the loop. Where the future is
        cancelled before it has begun, it is not called."""
        work = _Work(function, contextvars.copy_context(), self._loop.create_future())
        with self._lock:
            self._waiting.append(work)
            grows = len(self._waiting) > self._idle and self.count < self.eager
            if grows:
                self.count += 1
        self._queue.put(work)
        if grows:
            self._start()
        return work.future

    def watch(self) -> None:
        """Make more threads where every one is stuck; called on the loop now and then."""
        with self._lock:
            oldest = self._waiting[0].since if self._waiting else None
            if oldest is None or time.monotonic() - oldest < STALLED_S:
                return
            more = min(len(self._waiting), self.most - self.count)
            self.count += max(more, 0)
        for _ in range(more):
            self._start()

    def close(self) -> None:
        """Let idle threads end; what runs is left alone."""
        for _ in range(self.count):
            self._queue.put(None)

    def _start(self) -> None:
        self.starter.start(self._work, f"asyncio-pool-{self._name}")

    def _work(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            work = self._queue.get()
            with self._lock:
                self._idle -= 1
                if work is not None:
                    self._waiting.remove(work)
            if work is None:
                return
            if not work.future.cancelled():
                work.run()
            self._done.append(work)
            del work
            if not self._told:
                self._told = True
                try:
                    self._loop.call_soon_threadsafe(self._tell)
                except RuntimeError:  # the loop is closed, and nobody waits
                    return

    def _tell(self) -> None:
        self._told = False
        while self._done:
            self._done.popleft().settle()
