"""What makes threads for an event loop."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

logger: logging.Logger = logging.getLogger(__name__)

RETRY_S = 1.0


class Starter:
    """Starts threads, in a thread of its own: `Thread.start` waits until the new thread runs. On a busy machine that
    takes long, and on the loop every task would wait too."""

    def __init__(self) -> None:
        self._wanted: queue.SimpleQueue[tuple[Callable[[], None], str] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="asyncio-pool-starter", daemon=True).start()

    def start(self, target: Callable[[], None], name: str) -> None:
        """Start a daemon thread soon."""
        self._wanted.put((target, name))

    def close(self) -> None:
        """Start no more, but for those that were asked for."""
        self._wanted.put(None)

    def _serve(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            target, name = wanted
            while not self._starts(target, name):
                time.sleep(RETRY_S)

    def _starts(self, target: Callable[[], None], name: str) -> bool:
        try:
            threading.Thread(target=target, name=name, daemon=True).start()
        except RuntimeError as error:  # the system has no room for another one
            logger.error("Could not start the thread %s: %s", name, error)
            return False
        return True
