"""The event loop of a process whose worker pool has none: nothing blocks it either.

Under prefork, threads and solo Celery's tracer runs in a thread of its own, and may wait there. But the body of an
`async def` task publishes on the loop, where it would stop every other one, and the time limits.
"""

from __future__ import annotations

from celery import Celery

from ...strategies.asynchronous import loop_thread
from . import offloading
from .starter import Starter
from .threads import Threads


class Beside:
    """Takes what blocks off each event loop of `app`'s worker, and of its pool processes."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Beside) and other._app is self._app

    def __hash__(self) -> int:
        return hash(id(self._app))

    def __call__(self, thread: loop_thread.LoopThread) -> None:
        starter = Starter()  # here: its thread too must begin to run
        thread.run(lambda: self._begin(thread, starter))

    def _begin(self, thread: loop_thread.LoopThread, starter: Starter) -> None:
        senders = self._app.conf.broker_pool_limit or offloading.MESSAGES
        results, messages = (Threads(starter, thread.loop, name, senders, senders) for name in ("results", "messages"))
        offloads = offloading.Offloads(self._app, results, messages)
        thread.closing += [starter.close, results.close, messages.close, offloads.undo]


def take_off(app: Celery) -> None:
    """Let nothing that `app` publishes or asks for block an event loop of this process, or of those that it forks."""
    loop_thread.on_start(Beside(app))


def leave(app: Celery) -> None:
    """The worker of `app` is over."""
    loop_thread.forget(Beside(app))
