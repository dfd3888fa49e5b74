"""One process that runs tasks as a process of a worker pool does, in one thread, with no broker behind it."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterable
from typing import TypeVar

from celery import Celery, signals

Result = TypeVar("Result")
WORKER_POOLS = ("solo", "threads", "gevent", "prefork")


def make_workers(apps: Iterable[Celery], pool: str) -> None:
    """Make a worker of each app, all but the running: its bootsteps."""
    for app in apps:
        app.WorkController(pool=pool, concurrency=1)


def begin(pool: str) -> None:
    """Be the process that runs tasks: under prefork a child of this one, which ends when that does."""
    if pool == "prefork":
        child = os.fork()
        if child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        _become_pool_process()


def _become_pool_process() -> None:
    from billiard.pool import soft_timeout_sighandler

    signals.worker_process_init.send(sender=None)
    signal.signal(signal.SIGUSR1, soft_timeout_sighandler)


def call(pool: str, function: Callable[[], Result]) -> Result:
    """Call `function` where `pool` runs its tasks: in a greenlet, or here."""
    if pool != "gevent":
        return function()
    import gevent

    result: Result = gevent.spawn(function).get()
    return result


def settle() -> None:
    """Take what is there so far out of the garbage collector, and let it run only when it is called."""
    gc.collect()
    gc.freeze()
    gc.disable()
