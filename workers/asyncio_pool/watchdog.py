"""Names the task that blocks the event loop (`alchemy_warn_blocked_s`)."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from .identity import Identity, identity_in
from .starter import Starter

logger: logging.Logger = logging.getLogger(__name__)

LONGEST_INTERVAL_S = 0.25
FRAMES = 14
"""Lines of the stack that are shown."""


class Watchdog:
    """Warns once each time that the event loop stands still for too long.

    Args:
        starter: Makes its thread.
        limit_s: For so many seconds.
        of_task: Returns the request that an asyncio task runs, where its context does not say (Python 3.11).
        at_beat: Called on the loop at each beat.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        starter: Starter,
        limit_s: float,
        of_task: Callable[[Any], Identity | None],
        at_beat: Callable[[], None],
    ) -> None:
        self.interval_s: float = min(limit_s / 8, LONGEST_INTERVAL_S)
        self._starter = starter
        self._loop, self._limit_s, self._of_task, self._at_beat = loop, limit_s, of_task, at_beat
        self._last = time.monotonic()
        self._thread_id = 0
        self._warned_at: float | None = None
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to watch; called on the loop."""
        self._thread_id = threading.get_ident()
        self._beat()
        self._starter.start(self._watch, "asyncio-pool-watchdog")

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()

    def _beat(self) -> None:
        self._last = time.monotonic()
        self._at_beat()
        if not self._stopped.is_set():
            self._loop.call_later(self.interval_s, self._beat)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._stopped.wait(self.interval_s):
            now, before = time.monotonic(), looked
            looked = now
            if now - before > self.interval_s + self._limit_s / 2:
                continue  # this thread stood still too: the process was stopped, or the machine is overloaded
            try:
                self._look(now)
            except Exception:
                logger.exception("Looking for what blocks the event loop failed")

    def _look(self, now: float) -> None:
        last = self._last
        silent_s = now - last
        if silent_s <= self._limit_s + self.interval_s:
            if self._warned_at is not None:
                logger.info("The event loop goes on; it stood still for about %.1f s", last - self._warned_at)
                self._warned_at = None
        elif self._warned_at is None:
            self._warned_at = last
            self._warn(silent_s)

    def _warn(self, silent_s: float) -> None:
        who = self._who()
        frame = sys._current_frames().get(self._thread_id)
        stack = "".join(traceback.format_stack(frame)[-FRAMES:]) if frame is not None else "  (no stack)\n"
        logger.warning(
            "%s has blocked the event loop for %.1f s: no other task of this worker runs meanwhile, and no time limit "
            "can stop it. Await what it waits for, call it by `await asyncio.to_thread(...)`, or make the task an "
            "ordinary `def`, which runs in a thread. It is here:\n%s",
            who, silent_s, stack.rstrip(),
        )  # fmt: skip

    def _who(self) -> str:
        task = asyncio.current_task(self._loop)
        if task is None:
            return "Code that no task runs"
        found = self._of_task(task)
        if found is None and hasattr(task, "get_context"):
            found = identity_in(task.get_context())
        return f"Task {found.label}" if found is not None else f"The coroutine {task.get_coro()!r}"
