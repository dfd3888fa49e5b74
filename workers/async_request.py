"""A request of an `async def` task, step by step.

arrive     Celery's tracer calls `run`, in a thread of the worker pool or, under asyncio, in a greenlet on the loop
cross      in a thread: what follows runs in a greenlet on the event loop of the process, and the thread waits for it
enter      as for any task (`request`): the unit of work begins in that greenlet
run        the coroutine is stepped in it, and may be interrupted at each `await`
end        the COMMIT, awaited there too; it is not interrupted

Called like a function, a task gives its coroutine, which joins the unit of work of whoever awaits it.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from types import CoroutineType
from typing import Any

from celery.app.task import Context

from ..strategies.asynchronous import loop_thread
from ..strategies.asynchronous.hosting import Interruption, check_later, host
from ..strategies.asynchronous.units import AsyncUnits
from ..strategies.interrupts import current_interruption, shield
from ..strategies.place import current_coroutine
from ..strategies.registry import innermost_entry
from ..strategies.scope import SCOPE, current_scope, runs_in_greenlet
from ._celery import identify_by, uses_fast_locals, working_as, working_on
from .asyncio_pool.identity import Identity, become, who
from .errors import ConfigurationError
from .interruptions import as_celerys, soft_limit
from .request import Call, Enter, RequestRunner, is_traced, is_workers, label_of, leave_inner, request_of
from .soft_limits import SOFT_LIMIT_SIGNAL, begin_holding_back


class HostingRunner(RequestRunner):
    """Runs requests in a greenlet on the event loop, where the units of work are those of ordinary code."""

    def run(self, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        result = super().run(functools.partial(_hosted, call, task, True), task, args, kwargs)
        check_later()  # `apply()` in another task, whose limit has waited for this COMMIT
        return result

    def inside(self, enter: Enter, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        """Run `call` in the unit of work that `enter` opens or joins, and end it."""
        if not isinstance(call, functools.partial):
            call = functools.partial(_hosted, call, task, False)
        return super().inside(enter, call, task, args, kwargs)


def _hosted(call: Call, task: Any, is_body: bool, *args: Any, **kwargs: Any) -> Any:
    """Run `call` and the coroutine that it gives; a time limit is raised in the body alone."""
    interruption = current_interruption.get() if is_body else None
    try:
        if interruption is not None:
            interruption.arm()
        try:
            result = call(*args, **kwargs)
            if type(result) is CoroutineType or inspect.iscoroutine(result):
                result = host(result)
            if is_body:
                _prepare()
        finally:
            if interruption is not None:
                interruption.disarm()
    except asyncio.CancelledError as error:
        raise as_celerys(error, task.name) from None
    return result


def _prepare() -> None:
    """Flush what the body has left: that may take long, and a time limit is right to stop it."""
    entry = innermost_entry()
    if entry is not None and entry.ends and (entry.opened is not None or entry.has_parts or not entry.owns):
        entry.unit.prepare()


class AsyncRunner(RequestRunner):
    """Takes the requests of one `async def` task to the event loop.

    Args:
        runner: Runs them there.
        units: Opens the units of work of coroutines.
    """

    registry: AsyncUnits

    def __init__(self, runner: RequestRunner, units: AsyncUnits) -> None:
        super().__init__(units, runner.options, runner.hook_options)
        self._runner = runner

    def run(self, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        request = request_of(task)
        if not is_traced(request) and not is_error_callback(args):
            return self._awaited(call, task, args, kwargs, request)
        scope = getattr(current_scope(), SCOPE, None)
        if scope is not None and scope.hosts is not None:  # `_on_loop` knows it too, and asks more
            return self._runner.run(call, task, args, kwargs)
        return self._on_loop(lambda: self._runner.run(call, task, args, kwargs), task, request)

    def run_call(self, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        request = request_of(task)
        if not is_traced(request):
            return call(*args, **kwargs)  # `run`, which it calls, gives a coroutine
        return self._on_loop(lambda: self._runner.run_call(call, task, args, kwargs), task, request)

    def run_hook(self, name: str, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        return self._on_loop(lambda: self._runner.run_hook(name, call, task, args, kwargs), task, request_of(task))

    def _on_loop(self, function: Callable[[], Any], task: Any, request: Any) -> Any:
        """Call `function` in a greenlet on the event loop, whatever thread this is."""
        if runs_in_greenlet():
            return function()
        refuse_in_coroutine(task)
        strategy = self.registry.started()
        refusal = strategy.refuses(strategy.worker_pool)
        if refusal is not None:
            raise ConfigurationError(f"{task.name} is an `async def` task, and {refusal}.")
        return self._cross(functools.partial(_as_request, task, request, function), request)

    def _cross(self, function: Callable[[], Any], request: Any) -> Any:
        return loop_thread.started().run(function, Interruption(soft_limit))

    # -- called like a function --------------------------------------------------------------------------------------

    async def _awaited(self, call: Call, task: Any, args: Any, kwargs: Any, request: Any) -> Any:
        current = self.registry.current_entry()
        if current is None:
            block = self.registry.open_async(
                label_of(request, task), options=self.options, kind="run", holder=task, request=request
            )
            async with block:
                return await call(*args, **kwargs)
        self._refuse_other_mode(current, task)
        entry = self.registry.join(current, kind="run", holder=task, request=request)
        # In a child coroutine others take turns with this one, and would find its request.
        shown = working_as(task, request) if runs_in_greenlet() else nullcontext()
        try:
            with shown:
                return await call(*args, **kwargs)
        finally:
            if entry.scope.units[-1] is not entry:
                leave_inner(self.registry, entry)
            self.registry.leave(entry)


def _as_request(task: Any, request: Any, function: Callable[[], Any]) -> Any:
    """Call `function` on the event loop as `request` of `task`, its child coroutines and threads included."""
    if not uses_fast_locals():
        identify_by(who)
        identify_by(who, task)
        become(Identity(f"{task.name}[{request.id}]" if request is not None else task.name))
    return working_on(task, request, function)


def refuse_in_coroutine(task: Any) -> None:
    """Refuse `task.apply()` where nothing can wait for it.

    Raises:
        ConfigurationError: says what to write.
    """
    if current_coroutine() is not None and not runs_in_greenlet():
        raise ConfigurationError(
            f"{task.name}.apply() in a coroutine would stop the event loop, and with it what the task waits for. "
            f"Write `await {task.__name__}(...)`, which joins the unit of work that is open; or, for a request of "
            f"its own, `await asyncio.to_thread({task.__name__}.apply, args)`."
        )


def is_error_callback(args: Any) -> bool:
    """Tell whether Celery calls a task as an error callback: like a function, with the request that has failed. It
    awaits nothing, so the task runs now."""
    return any(isinstance(argument, Context) for argument in args[:2])


class DeferringAsyncRunner(AsyncRunner):
    """The same under prefork, where the signal of a soft limit strikes the thread that waits: it is handed to the
    loop."""

    @shield.covers
    def _cross(self, function: Callable[[], Any], request: Any) -> Any:
        if SOFT_LIMIT_SIGNAL is not None and shield.install(SOFT_LIMIT_SIGNAL):
            begin_holding_back()
        if not shield.applies:
            return super()._cross(function, request)
        workers = is_workers(request)
        if workers:
            shield.reset()  # what came too late for the request before is not for this one
        held = shield.depth
        shield.depth = held + 1
        try:
            thread, interruption = loop_thread.started(), Interruption(soft_limit)
            shield.handed_to = lambda: thread.loop.call_soon_threadsafe(interruption.soft)
            if shield.pending is not None:
                shield.handed_to()
            return thread.run(function, interruption)
        finally:
            shield.handed_to = None
            shield.depth = held
            if workers:
                shield.pending = None  # what it would stop is over
                shield.ended = request.id
