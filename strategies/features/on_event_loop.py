"""What runs after the COMMIT of an AsyncSession: in a thread, so that a broker that is down does not stop the loop.

SQLAlchemy calls the listeners of an AsyncSession in a greenlet, where a coroutine can be awaited. So the caller's
`await session.commit()` itself waits for the callbacks, and the other coroutines of the loop go on.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import groupby
from typing import Any

from sqlalchemy.util import await_only

from ..engines import forks
from ..interrupts import is_interrupt
from ..on_commit import Callback, CommitCallbacks
from .following import after_commit

Entry = tuple[Callback, bool]
"""A callback, and whether its error is raised to who commits."""

THREADS = 32
"""The most COMMITs whose callbacks run at a time in a process. Not the loop's own threads: a broker that does not
answer would take them away from whatever else needs them, such as looking up the address of the database."""


class _Threads:
    """The threads of this process that run callbacks; made at first use."""

    def __init__(self) -> None:
        self.executor: ThreadPoolExecutor | None = None
        forks.on_fork(self.after_fork)

    def after_fork(self) -> None:
        """Begin anew in the child, which has none of the parent's threads."""
        self.executor = None

    def submit(self, function: Callable[[], None]) -> Future[None]:
        """Run `function` in a thread, in a copy of the present context."""
        if self.executor is None:
            self.executor = ThreadPoolExecutor(THREADS, thread_name_prefix="celery-alchemy-on-commit")
        return self.executor.submit(contextvars.copy_context().run, function)


_threads: _Threads | None = None
#: Tasks that nobody else holds.
_tasks: set[asyncio.Task[None]] = set()


def is_coroutine_function(callback: Any) -> bool:
    """Tell whether calling `callback` gives a coroutine, to be awaited."""
    called = getattr(callback, "func", callback)  # of a partial
    return inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(getattr(called, "__call__", None))  # noqa: B004


def start_in_thread(function: Callable[[], None]) -> Future[None]:
    """Run `function` in a thread, to its end, whoever waits for it."""
    global _threads  # noqa: PLW0603 - once for all of the process
    _threads = _threads or _Threads()
    return _threads.submit(function)


def run_in_thread(function: Callable[[], None]) -> None:
    """Run `function` in a thread, and wait for it without stopping the loop; called in SQLAlchemy's greenlet.

    It runs to its end even if the coroutine that waits is cancelled.
    """
    await_only(_end_of(start_in_thread(function)))


async def _end_of(future: Future[None]) -> None:
    done = asyncio.wrap_future(future)
    done.add_done_callback(_look_at)
    await asyncio.shield(done)


def start_on_loop(callback: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
    """Run the coroutine that `callback` gives in a task of its own."""
    task = asyncio.get_running_loop().create_task(callback())
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    task.add_done_callback(_look_at)
    return task


def run_callback(callback: Callback) -> None:
    """Run `callback`, on behalf of a COMMIT that has been."""
    with after_commit():
        callback()


async def _run_coroutine(callback: Any) -> None:
    with after_commit():
        await callback()


def _run_on_loop(callback: Callback) -> None:
    await_only(asyncio.shield(start_on_loop(functools.partial(_run_coroutine, callback))))


def run_callbacks(batch: Sequence[Entry]) -> None:
    """Run callbacks in their order, ordinary functions in a thread, `async def` ones on the loop; called in
    SQLAlchemy's greenlet. They are run even if the coroutine that commits is cancelled meanwhile.

    Args:
        batch: Each callback, and whether its error is to be raised, once all have run.
    """
    groups = [
        (of_loop, list(entries)) for of_loop, entries in groupby(batch, lambda one: is_coroutine_function(one[0]))
    ]
    failed: BaseException | None = None
    while groups:
        of_loop, entries = groups.pop(0)
        callbacks = CommitCallbacks(_run_on_loop if of_loop else run_callback)
        callbacks._ready.extend(entries)
        future = None if of_loop else start_in_thread(callbacks.run_ready)
        try:
            if future is None:
                callbacks.run_ready()
            else:
                await_only(_end_of(future))
        except Exception as error:
            if failed is None or is_interrupt(error):
                failed = error
        except BaseException:
            _go_on([*(callbacks._ready if of_loop else ()), *(entry for _, rest in groups for entry in rest)], future)
            raise
    if failed is not None:
        raise failed


def _go_on(rest: Sequence[Entry], after: Future[None] | None) -> None:
    """Run what is left, though nothing waits for it: ordinary functions in their order, and `after` is done."""
    callbacks = CommitCallbacks(run_callback)
    for callback, raises in rest:
        if is_coroutine_function(callback):
            start_on_loop(functools.partial(_run_coroutine, callback))
        else:
            callbacks._ready.append((callback, raises))

    def run() -> None:
        if after is not None:
            wait([after])
        callbacks.run_ready()

    if callbacks._ready:
        start_in_thread(run)


def _look_at(done: asyncio.Future[None]) -> None:
    """Take note of its error, which is logged where it happened: the coroutine that waited may have been cancelled."""
    if not done.cancelled():
        done.exception()
