"""The consumer's thread: what acknowledges and rejects messages is called there."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable
from typing import Any

from .._celery import serve_while_stopping

logger: logging.Logger = logging.getLogger(__name__)


class HubThread:
    """Calls functions in the thread of Kombu's hub, in their order: the broker's connection belongs to it.

    The hub is told by a pipe. `hub.call_soon` takes a lock, which its thread may hold when a signal handler of Celery's
    runs in it, cancels every task and calls this: a cold shutdown would never end.
    """

    def __init__(self) -> None:
        self._hub: Any = None
        self._waiting: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._told = False
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)

    def use(self, hub: Any) -> None:
        """Serve `hub`; called each time that the consumer begins to consume."""
        self._hub = hub
        hub.add_reader(self._pipe[0], self._woken)

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call `function` there soon, from any thread."""
        self._waiting.append((function, args))
        if not self._told:
            self._told = True
            with contextlib.suppress(BlockingIOError):
                os.write(self._pipe[1], b"x")

    def serve(self) -> None:
        """Do what the hub would do; called in its thread, when the worker stops and the hub does not run any more."""
        self._run()
        try:
            serve_while_stopping(self._hub)
        except Exception:
            logger.exception("Acknowledging while the worker stops failed")

    def _woken(self, *_: Any) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._pipe[0], 4096)
        self._run()

    def _run(self) -> None:
        self._told = False
        while self._waiting:
            function, args = self._waiting.popleft()
            try:
                function(*args)
            except Exception:
                logger.exception("A message could not be settled")
