"""The threads of `asyncio.to_thread` and `loop.run_in_executor(None, ...)` in the worker pool."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .starter import Starter


class DaemonExecutor(ThreadPoolExecutor):
    """As many threads as tasks may want at a time, and none that keeps the process from ending.

    asyncio's own has four more than there are processors, so that tasks would wait for each other; and the interpreter
    waits for its threads, so that a function that hangs would hold up the end of the worker.
    """

    def __init__(self, starter: Starter, most: int) -> None:
        super().__init__(most)
        self._starter = starter
        self.most: int = most
        """The most threads."""
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._count = self._unclaimed = self._free = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._guard:
            self._unclaimed += 1
            grows = self._unclaimed > self._free and self._count < self.most
            self._count += grows
        self._calls.put((future, lambda: fn(*args, **kwargs)))
        if grows:
            self._starter.start(self._serve, "asyncio-pool-to-thread")
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let idle threads end; none is waited for."""
        for _ in range(self._count):
            self._calls.put(None)

    def _serve(self) -> None:
        while True:
            with self._guard:
                self._free += 1
            call = self._calls.get()
            with self._guard:
                self._free -= 1
                self._unclaimed -= call is not None
            if call is None:
                return
            future, function = call
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)
            del call, future, function
