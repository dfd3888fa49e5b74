"""Worker pools of third parties."""

import threading
from typing import Any

from celery.concurrency.base import BasePool, apply_target
from celery.concurrency.thread import TaskPool as ThreadsPool


class Threads(ThreadsPool):
    """Built on one of Celery's."""


class House(BasePool):
    """Related to none of Celery's: `limit` threads, each of which handles one task and ends."""

    def on_start(self) -> None:
        self.slots = threading.Semaphore(self.limit)
        self.threads: set[threading.Thread] = set()

    def on_apply(
        self, target: Any, args: Any = None, kwargs: Any = None, callback: Any = None, accept_callback: Any = None,
        **_: Any,
    ) -> None:  # fmt: skip
        def handle() -> None:
            with self.slots:
                apply_target(target, args, kwargs, callback, accept_callback)
            self.threads.discard(threading.current_thread())

        thread = threading.Thread(target=handle)
        self.threads.add(thread)
        thread.start()

    def on_stop(self) -> None:
        for thread in list(self.threads):
            thread.join()
