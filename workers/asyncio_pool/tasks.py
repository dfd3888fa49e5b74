"""How each task of the app runs in the worker pool: on the event loop, or in a thread."""

from __future__ import annotations

import asyncio
import enum
import functools
import inspect
from collections.abc import Callable
from typing import Any

from ...strategies.asynchronous.hosting import host
from ...strategies.asynchronous.strategy import PerLoopStrategy
from ...strategies.interrupts import current_interruption
from .. import apps
from .._celery import identify_by, run_of, running_request
from ..interruptions import as_celerys
from ..wrapping import is_database_task
from . import identity

_HOSTED = "_celery_alchemy_hosted"
_BEGUN = "_celery_alchemy_begun"


class Way(enum.Enum):
    """How the requests of a task run."""

    LOOP = "on the event loop"
    """`async def`: its coroutine is awaited."""
    THREAD = "in a thread"
    """`def`: what it waits for stops nothing else."""
    GREENLET = "in a greenlet on the event loop, for their database driver can only be awaited"
    """`def`: its Session awaits; what else it waits for stops every task."""


def prepare(task: Any) -> Way:
    """Make `task` ready for this worker pool, once; return how it runs."""
    identify_by(identity.who, task)
    name, function = run_of(task)
    if getattr(function, _HOSTED, False):
        return Way.LOOP
    if is_database_task(task):
        if getattr(task, "is_async", False):
            return Way.LOOP
        db = apps.find(task.app)
        return Way.GREENLET if db is not None and isinstance(db.strategy, PerLoopStrategy) else Way.THREAD
    if not inspect.iscoroutinefunction(inspect.unwrap(function)):
        return Way.THREAD
    setattr(task, name, hosted(function, task.name))
    return Way.LOOP


def hosted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return `function`, the `async def` function of the task `name`, which is no DatabaseTask, for Celery's tracer to
    call: it gets what the coroutine returns. Whoever calls the task like a function gets a coroutine, as ever."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        interruption = current_interruption.get()
        request = running_request()
        called = request is None or request.called_directly or _BEGUN in request.__dict__
        if interruption is None or called:
            return function(*args, **kwargs)
        request.__dict__[_BEGUN] = True
        try:
            try:
                interruption.arm()
                result = function(*args, **kwargs)
                return host(result) if inspect.iscoroutine(result) else result
            finally:
                interruption.disarm()
        except asyncio.CancelledError as error:
            raise as_celerys(error, name) from None

    setattr(run, _HOSTED, True)
    return run
