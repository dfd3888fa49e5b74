"""A barrier for greenlets and threads of one process."""

import threading
import time

TIMEOUT_S = 60


class Gathering:
    """Lets each of `parties` greenlets through once all have come."""

    def __init__(self, parties: int) -> None:
        self._parties, self._come = parties, 0
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            self._come += 1
        deadline = time.monotonic() + TIMEOUT_S
        while self._come < self._parties:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self._come} of {self._parties} came")
            time.sleep(0.001)
