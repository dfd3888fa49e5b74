"""One task request in the worker pool: Celery's own tracer, whole, in a greenlet on the event loop or in a thread."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any, Protocol

from sqlalchemy.util import await_only

from ...strategies.asynchronous.hosting import Interruption, drive
from ..interruptions import soft_limit
from .identity import Identity, become
from .reports import Report, as_info
from .tasks import Way
from .threads import Threads


class Pool(Protocol):
    """What a job needs of its worker pool."""

    loop: asyncio.AbstractEventLoop
    bodies: Threads
    """For `def` tasks."""
    requests: Threads
    """For what is told to requests, where that may block."""
    acknowledges_elsewhere: bool
    """The consumer's hub sends acknowledgements and events: to tell a request something does not block."""

    def forget(self, job: Job) -> bool: ...
    def ended(self, job: Job) -> None: ...
    def keep(self, task: asyncio.Task[Any]) -> None: ...
    def call(self, function: Callable[..., Any], *args: Any) -> None: ...


class Job:
    """A task request, from its message to its report.

    Args:
        call: Runs Celery's tracer.
        limits_s: The soft and the hard time limit; None for none.
    """

    __slots__ = (
        "__weakref__",
        "_call",
        "_hard_s",
        "_home",
        "_interruption",
        "_soft_s",
        "_telling",
        "identity",
        "is_over",
        "report",
        "started",
        "task",
        "way",
    )  # fmt: skip

    def __init__(
        self,
        pool: Pool,
        way: Way,
        call: Callable[[], Any],
        report: Report,
        label: str,
        limits_s: tuple[float | None, float | None],
    ) -> None:
        self._home, self._call = pool, call
        self._soft_s, self._hard_s = limits_s
        self._interruption = Interruption(soft_limit)
        self._telling: asyncio.Task[None] | None = None
        self.way: Way = way
        self.report: Report = report
        self.identity: Identity = Identity(label)
        self.started: bool = False
        """It has a slot."""
        self.is_over: bool = False
        """Its tracer has ended: no time limit is for it any more."""
        self.task: asyncio.Task[None] | None = None
        """What runs it."""
        report.pid.job = self

    # -- called by the consumer, in its thread ------------------------------------------------------------------------

    def terminate(self, signal: Any = None) -> None:
        """End it soon: `revoke(terminate=True)`, or the worker ends. One that waits for a slot is told so at once."""
        self._home.call(self.kill)

    # -- on the loop --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run it, in a context of its own: no ContextVar of another task is seen in it."""
        self.started = True
        self.task = self._home.loop.create_task(self._run(), context=contextvars.Context())

    def kill(self, *, shutdown: bool = False) -> None:
        """End it. A COMMIT that is under way is waited for, but when the worker ends; a thread cannot be stopped."""
        if self.is_over:
            return
        if not self.started:
            if self._home.forget(self):
                self._home.keep(self._home.loop.create_task(self._revoke()))
        elif self.way is not Way.THREAD and (shutdown or not self._interruption.killed):
            self._interruption.kill(shutdown=shutdown)

    async def _run(self) -> None:
        become(self.identity)
        try:
            if self.report.is_unwanted() and await self._revoke():
                return
            if self.way is Way.THREAD:
                await self._home.bodies.run(self._in_thread)
            else:
                await self._trace_and_tell()
            if self._telling is not None:
                await self._telling
        finally:
            self.is_over = True
            self.report.pid.job = None
            self._home.ended(self)

    async def _trace_and_tell(self) -> None:
        timers = self._limits() if self._soft_s or self._hard_s else ()
        error = outcome = None
        try:
            outcome = await drive(self._in_greenlet, self._interruption)
        except GeneratorExit:
            raise
        except BaseException as raised:
            if not self._interruption.killed:
                error = as_info(raised)
        finally:
            self.is_over = True
            for timer in timers:
                timer.cancel()
        if self._interruption.killed:
            return
        report = self.report
        if error is not None:
            await self._home.requests.run(lambda: report.failed(error))
        elif outcome is None or outcome[0] or not self._home.acknowledges_elsewhere:
            await self._home.requests.run(lambda: report.succeeded(outcome))
        else:
            report.succeeded(outcome)

    def _in_greenlet(self) -> Any:
        if self._home.acknowledges_elsewhere:
            self.report.accepted()
        else:
            await_only(self._home.requests.run(self.report.accepted))
        return self._call()

    def _in_thread(self) -> None:
        """Run all of it, its report too, as the worker pool `threads` does."""
        contextvars.Context().run(self._in_context)

    def _in_context(self) -> None:
        self.report.accepted()
        try:
            outcome = self._call()
        except BaseException as raised:
            self.report.failed(as_info(raised))
        else:
            self.report.succeeded(outcome)

    async def _revoke(self) -> bool:
        return bool(await self._home.requests.run(self.report.revoke))

    # -- time limits --------------------------------------------------------------------------------------------------

    def _limits(self) -> list[asyncio.TimerHandle]:
        loop, timers = self._home.loop, []
        if self._soft_s:
            timers.append(loop.call_later(self._soft_s, self._on_soft_limit, self._soft_s))
        if self._hard_s:
            timers.append(loop.call_later(self._hard_s, self._on_hard_limit, self._hard_s))
        return timers

    def _on_soft_limit(self, seconds: float) -> None:
        if not self._interruption.killed:
            self.report.timed_out(seconds, soft=True)
            self._interruption.soft(seconds)

    def _on_hard_limit(self, seconds: float) -> None:
        if self._interruption.killed:
            return
        self._interruption.kill()  # first: what is stored from now on is the time limit
        self._telling = self._home.loop.create_task(self._tell_timeout(seconds))

    async def _tell_timeout(self, seconds: float) -> None:
        await self._home.requests.run(lambda: self.report.timed_out(seconds, soft=False))
