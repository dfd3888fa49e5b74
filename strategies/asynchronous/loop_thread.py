"""The event loop of a process whose worker pool has none: in a thread of its own, made after the fork."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ..engines import forks
from .hosting import Interruption, drive

logger: logging.Logger = logging.getLogger(__name__)

Result = TypeVar("Result")

UNWIND_S = 5.0
"""A coroutine has so long to roll back where the thread that waits for it is to end."""
STOP_S = 5.0
END_S = 1.5
"""Seconds for each step of the end: what is left there is cancelled, then connections are closed."""


class LoopThread:
    """An event loop that runs in a daemon thread until it is stopped."""

    def __init__(self) -> None:
        self.closing: list[Callable[[], object]] = []
        """Called when it is to end, in the thread that ends it."""
        self.loop: asyncio.AbstractEventLoop = asyncio.new_event_loop()
        self._ends = False
        self._waiting: set[threading.Lock] = set()
        """Released when the loop has ended: who waits for something on it waits no more."""
        self._thread = threading.Thread(target=self._run, name="celery-alchemy-loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        stopped = False
        while not stopped:
            try:
                self.loop.run_forever()
                stopped = True
            except (SystemExit, KeyboardInterrupt):  # of a child coroutine; the others go on
                continue
        try:
            self.loop.run_until_complete(end_well(END_S))
        except BaseException:
            logger.exception("The event loop of this process did not end well")
        self.loop.close()
        while self._waiting:
            self._waiting.pop().release()

    def run(self, function: Callable[[], Result], interruption: Interruption | None = None) -> Result:
        """Call `function` in a greenlet on the loop, where it can await, and wait for its end.

        The context variables are those of the caller. Raises what `function` raises.

        Raises:
            RuntimeError: the loop has been stopped.
        """
        interruption = interruption or Interruption(lambda seconds: asyncio.CancelledError())
        outcome: list[Any] = []
        done = threading.Lock()
        done.acquire()
        context = contextvars.copy_context()

        async def whole() -> None:
            # What ends a thread must not end the loop, so nothing is raised out of here.
            try:
                outcome[:] = (True, await drive(function, interruption))
            except BaseException as error:
                if not self._ends or not isinstance(error, asyncio.CancelledError):
                    outcome[:] = (False, error)
            finally:
                self._waiting.discard(done)
                done.release()

        self._waiting.add(done)
        self.loop.call_soon_threadsafe(lambda: self.loop.create_task(whole(), context=context))
        try:
            done.acquire()
        except BaseException:
            self.loop.call_soon_threadsafe(lambda: interruption.kill(shutdown=True))
            done.acquire(timeout=UNWIND_S)
            raise
        if not outcome:
            raise RuntimeError("The event loop of this process was stopped while something waited for it.")
        returned, result = outcome
        outcome.clear()
        if returned:
            return result  # type: ignore[no-any-return]
        try:
            raise result
        finally:
            del result  # no cycle: exception -> traceback -> this frame -> exception

    def stop(self) -> None:
        """End the loop, and its thread."""
        while self.closing:
            self.closing.pop()()
        self._ends = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(STOP_S)


async def end_well(within_s: float) -> None:
    """End what is left on the running event loop, which is to be closed; each step takes `within_s` seconds at most.

    Tasks are cancelled; a `ClosingTask` goes on until it has ended. Then asynchronous generators are closed, by which
    `AwaitedEngines` close theirs.
    """
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=within_s)
    await asyncio.wait_for(asyncio.get_running_loop().shutdown_asyncgens(), within_s)


class _OfProcess:
    """The event loop of this process."""

    def __init__(self) -> None:
        self.thread: LoopThread | None = None
        self.lock = threading.Lock()
        self.begun: list[Callable[[LoopThread], object]] = []
        """Called with each event loop that is made here."""
        self.inherited: list[LoopThread] = []
        """Of parent processes: collected as garbage, a loop would close what the parent uses."""
        forks.on_fork(self.after_fork)

    def after_fork(self) -> None:
        """Begin anew in the child, which has none of the parent's threads."""
        self.lock = threading.Lock()
        if self.thread is not None:
            self.inherited.append(self.thread)
            self.thread = None


_process: _OfProcess | None = None


def current() -> LoopThread | None:
    """Return that of this process; None where it has none."""
    return _process.thread if _process is not None else None


def started() -> LoopThread:
    """Return that of this process, made now where it has none."""
    global _process  # noqa: PLW0603 - once for all of the process
    _process = _process or _OfProcess()
    with _process.lock:
        made = _process.thread is None
        if made:
            _process.thread = LoopThread()
        thread = _process.thread
    assert thread is not None
    if made:
        for function in _process.begun:
            function(thread)
    return thread


def on_start(function: Callable[[LoopThread], object]) -> None:
    """Call `function` with each event loop that `started` makes, in this process and in those that it forks."""
    global _process  # noqa: PLW0603 - once for all of the process
    _process = _process or _OfProcess()
    if function not in _process.begun:
        _process.begun.append(function)


def forget(function: Callable[[LoopThread], object]) -> None:
    """Call `function` no more."""
    if _process is not None and function in _process.begun:
        _process.begun.remove(function)


def use(thread: LoopThread | None) -> None:
    """Let `thread` be that of this process: the worker pool has one of its own."""
    global _process  # noqa: PLW0603 - once for all of the process
    _process = _process or _OfProcess()
    with _process.lock:
        _process.thread = thread


def stop() -> None:
    """End the event loop of this process: the worker is over."""
    if _process is not None:
        with _process.lock:
            thread, _process.thread = _process.thread, None
        if thread is not None:
            thread.stop()
