"""Coroutines inside synchronous code, and what stops them from outside.

`drive` makes a greenlet that may await, awaits for it, and turns the cancellations that its `Interruption` has asked
for into exceptions of their own. `host` steps a coroutine inside such a greenlet, so that the synchronous code around
it and inside it is that of one thread: the unit of work, its hooks, a ROLLBACK before a retry, a lazy load.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from sqlalchemy.util import await_only

from .._sqlalchemy import host_for
from ..interrupts import RETURN_S, current_interruption
from ..scope import begin_hosting, current_scope

Result = TypeVar("Result")

REPEAT_S = 1.0
"""A kill that code has swallowed is repeated after this time."""


class Killed(asyncio.CancelledError):
    """What `Interruption.kill` raises at an `await`: a hard time limit, a revoked task, the end of the worker."""


def host(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run `coroutine` inside the current greenlet, and return its result; whatever it waits for, the event loop does.

    Synchronous code that it calls may wait too, for it runs in the same greenlet: `Session.execute`, a lazy load.

    Raises:
        sqlalchemy.exc.MissingGreenlet: this is no greenlet of `greenlet_spawn`, and the coroutine waits for something.
    """
    error: BaseException | None = None
    sent: Any = None
    while True:
        try:
            waits = coroutine.send(sent) if error is None else coroutine.throw(error)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        finally:
            error = None  # no cycle: exception -> traceback -> this frame -> exception
        try:
            sent = await_only(_handed_on(waits))
        except BaseException as raised:
            error, sent = raised, None


@types.coroutine
def _handed_on(waits: Any) -> Generator[Any, Any, Any]:
    """Hand to the event loop what a coroutine waits for."""
    return (yield waits)


@types.coroutine
def drive(function: Callable[[], Result], interruption: Interruption) -> Generator[Any, Any, Result]:
    """Call `function` in a greenlet where it can await, in the current asyncio task, which `interruption` may stop from
    now on: the exceptions that it asks for are raised at the innermost `await`. Inside, it is `current_interruption`.

    Raises:
        Killed: `interruption` has been killed before; `function` is not called.
    """
    if interruption.killed:
        raise Killed
    interruption.task = asyncio.current_task()
    token = current_interruption.set(interruption)
    try:
        greenlet = host_for(function, current_scope())
        begin_hosting(greenlet, interruption)
        found = greenlet.switch()
        if not greenlet.dead:
            found = yield from _stoppable(_go_on(greenlet, found), interruption)
        return found  # type: ignore[no-any-return]
    finally:
        if interruption.cancels:
            interruption.take()
        interruption.task = None
        current_interruption.reset(token)


async def _go_on(greenlet: Any, waits: Any) -> Any:
    """Await what `greenlet` waits for until it ends."""
    while not greenlet.dead:
        try:
            result = await waits
        except BaseException as error:
            waits = greenlet.throw(type(error), error, error.__traceback__)
        else:
            waits = greenlet.switch(result)
    return waits


def _stoppable(coroutine: Coroutine[Any, Any, Result], interruption: Interruption) -> Generator[Any, Any, Result]:
    """Step `coroutine`, and raise in it what `interruption` asks for."""
    error: BaseException | None = None
    sent: Any = None
    while True:
        try:
            waits = coroutine.send(sent) if error is None else coroutine.throw(error)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        finally:
            error = None
        try:
            sent = yield waits
            if interruption.cancels:  # a child that was awaited may have swallowed the cancellation
                error = interruption.take()
        except asyncio.CancelledError as raised:
            error, sent = interruption.take() or raised, None
        except BaseException as raised:
            error, sent = raised, None


class Interruption:
    """What may stop one task request on an event loop. All but the constructor is called in the thread of that loop.

    The body is the task's own code. Around it `arm` and `disarm` are called, more than once where it runs again. A soft
    limit that comes before the body is raised when that begins; one that comes after it has no effect: the transaction
    has ended one way, and the result is stored that way. Nothing cuts what is inside `held()`, a COMMIT.

    Args:
        soft_limit: Makes the exception of a soft time limit from its seconds, which is also a CancelledError:
            libraries take it for a cancellation, and the task's code catches it as what it is.
    """

    __slots__ = (
        "__weakref__", "_armed", "_asked", "_held", "_seconds", "_soft_limit", "cancels", "kept", "killed", "struck",
        "task",
    )  # fmt: skip

    def __init__(self, soft_limit: Callable[[float | None], BaseException]) -> None:
        self._soft_limit = soft_limit
        self._armed = 0  # Bodies that run, one inside another
        self._held = 0
        self._asked: BaseException | None = None  # What is to be raised instead of the CancelledError on its way
        self._seconds: float | None = None
        self.kept: BaseException | None = None
        """A soft limit that waits for the body, or for the end of a COMMIT."""
        self.cancels: int = 0
        """Cancellations of the asyncio task that it has asked for, and that are on their way."""
        self.struck: int = 0
        """How many times it was raised at an `await`."""
        self.task: asyncio.Task[Any] | None = None
        """The asyncio task that drives the request; None before and after."""
        self.killed: bool = False
        """It is to end, whatever it does."""

    @property
    def in_body(self) -> bool:
        """The task's own code runs, not what Celery does around it."""
        return self._armed > 0

    def arm(self) -> None:
        """The body begins.

        Raises:
            BaseException: the soft limit that has come before.
        """
        self._armed += 1
        if self.kept is not None:
            try:
                self.check()
            except BaseException:
                self._armed -= 1
                raise

    def disarm(self) -> None:
        """The body has ended."""
        self._armed -= 1
        if self.cancels and not self._armed and not isinstance(self._asked, Killed):
            self.take()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold back what would interrupt the block: a COMMIT. A kill that comes meanwhile strikes at the next `await`
        after it, a soft limit after the next `check_later`."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if self.killed and not self._held:
                self._ask(Killed())

    def check(self) -> None:
        """Raise the soft limit that was held back, where the body is running and nothing holds it back any more."""
        if self._armed and not self._held:
            kept, self.kept = self.kept, None
            if kept is not None:
                raise kept

    def check_later(self) -> None:
        """Raise the soft limit that was held back by a COMMIT, unless the body returns within `RETURN_S`: then it has
        done its work, and that is committed."""
        if self.kept is not None and self.task is not None:
            self.task.get_loop().call_later(RETURN_S, self._deliver)

    def _deliver(self) -> None:
        if self._armed and not self._held:
            kept, self.kept = self.kept, None
            if kept is not None:
                self._ask(kept)

    def repeat(self) -> None:
        """Raise the soft limit once more, at the next `await`: the code that it has struck kept it to itself. A kill is
        repeated anyhow."""
        if self.task is not None and not self.killed:
            self.kept = self._soft_limit(self._seconds)
            self.task.get_loop().call_soon(self._deliver)

    def soft(self, seconds: float | None = None) -> None:
        """A soft time limit has passed."""
        if self.killed:
            return
        self._seconds = seconds
        error = self._soft_limit(seconds)
        if self._armed and not self._held:
            self._ask(error)
        else:
            self.kept = error

    def kill(self, *, shutdown: bool = False) -> None:
        """End the request. Whatever it awaits is cancelled, again and again while the code around it goes on.

        Args:
            shutdown: Not even a COMMIT is waited for: the process is about to end.
        """
        self.killed = True
        task = self.task
        if task is None or task.done():
            return
        if shutdown or not self._held:
            self._ask(Killed())
        task.get_loop().call_later(REPEAT_S, self.kill)

    def take(self) -> BaseException | None:
        """Return what is to be raised now instead of a CancelledError; None where the cancellation is another's."""
        asked, self._asked = self._asked, None
        self.struck += asked is not None
        task = self.task
        for _ in range(self.cancels if task is not None else 0):
            task.uncancel()  # type: ignore[union-attr]  # else asyncio.timeout and TaskGroup would take it for theirs
        self.cancels = 0
        return asked

    def _ask(self, error: BaseException) -> None:
        if self.task is not None:
            self._asked = error
            self.cancels += 1
            self.task.cancel()


def held() -> AbstractContextManager[None]:
    """Hold back what would interrupt the task request that runs here. In a child coroutine of it there is nothing to
    be held back: it is the request that is interrupted."""
    interruption: Interruption | None = current_interruption.get()
    return interruption.held() if interruption is not None and _is_own(interruption) else nullcontext()


def check_later() -> None:
    """Raise the soft limit that was held back by a COMMIT, where the body goes on."""
    interruption = current_interruption.get()
    if interruption is not None and interruption.kept is not None and _is_own(interruption):
        interruption.check_later()


def _is_own(interruption: Interruption) -> bool:
    """Tell whether it is the request itself that runs, and no child coroutine of it."""
    return interruption.task is asyncio.current_task()
