"""Puts `run`, an own `__call__` and the hooks of a task class into their units of work.

A wrapper looks up what runs the requests of its task, made once for each task (`request`), and calls it: nothing else.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from . import apps
from .injection import InjectedParameter, hidden, injected_parameters, injecting, places_of

_OURS = "_celery_alchemy_wrapper"
_PLACES = "_celery_alchemy_places"


def wrap_run(raw: Any) -> Callable[..., Any]:
    """Return `raw`, a task's `run` as it stands in the class body, inside the unit of work of the task request."""
    call, takes_task = _caller(raw), True
    places: list[InjectedParameter] = []
    names = injected_parameters(raw)
    signature = None
    if names:
        signature = inspect.signature(_like(lambda: None, raw))
        places = places_of(signature, names)
        call = injecting(call, places, *_kinds_of_session(raw))
    elif isinstance(raw, staticmethod):
        call, takes_task = raw.__func__, False

    def run(*args: Any, **kwargs: Any) -> Any:
        self = args[0]
        if not takes_task:
            args = args[1:]
        db = getattr(self.app, apps.ATTRIBUTE, None) or apps.find(self.app)
        if db is None:
            return call(*args, **kwargs)  # `self.db` says so; a task that touches no database needs none
        return (db.runners.get(type(self)) or db.runner_of(self)).run(call, self, args, kwargs)

    wrapper = _like(run, raw)
    if signature is not None:
        wrapper.__signature__ = hidden(signature, names)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {name: one for name, one in wrapper.__annotations__.items() if name not in names}
        setattr(wrapper, _PLACES, places)
    return wrapper


def _kinds_of_session(raw: Any) -> tuple[Any, ...]:
    """Return what kinds of Session a caller may pass to `raw` by hand, where these are not the ordinary ones."""
    if not inspect.iscoroutinefunction(inspect.unwrap(getattr(raw, "__func__", raw))):
        return ()
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

    return ((AsyncSession, async_scoped_session),)


def injected_places(run: Callable[..., Any]) -> list[InjectedParameter]:
    """Return where `wrap_run` passes the Session to what it has wrapped."""
    return getattr(run, _PLACES, [])


def wrap_call(raw: Any) -> Callable[..., Any]:
    """Return `raw`, a task's own `__call__`, inside the unit of work that the `run` it calls will end."""
    call = _caller(raw)

    def __call__(self: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        db = apps.find(self.app)
        args = (self, *args)
        return call(*args, **kwargs) if db is None else db.runner_of(self).run_call(call, self, args, kwargs)

    return _like(__call__, raw)


def wrap_hook(name: str, raw: Any) -> Callable[..., Any]:
    """Return `raw`, one of Celery's task hooks, inside a unit of work of its own, committed when it returns."""
    call = _caller(raw)

    def hook(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        db = apps.find(self.app)
        args = (self, *args)
        return call(*args, **kwargs) if db is None else db.runner_of(self).run_hook(name, call, self, args, kwargs)

    return _like(hook, raw)


def _caller(raw: Any) -> Callable[..., Any]:
    """Return `raw` as a function that takes the task first, whatever kind of attribute it is."""
    if isinstance(raw, staticmethod):
        function = raw.__func__

        def call_static(task: Any, /, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return call_static
    if inspect.isfunction(raw):
        return raw
    bind = getattr(raw, "__get__", None)

    def call(task: Any, /, *args: Any, **kwargs: Any) -> Any:
        return (raw if bind is None else bind(task, type(task)))(*args, **kwargs)

    return call


def _like(wrapper: Callable[..., Any], raw: Any) -> Callable[..., Any]:
    """Make `wrapper` look like `raw`, with the task as its first parameter."""
    function = getattr(raw, "__func__", raw)
    functools.update_wrapper(wrapper, function)
    # task_annotations' '@run' replaces a function by its `__wrapped__`, and would take the unit of work away.
    del wrapper.__wrapped__  # type: ignore[attr-defined]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        if not inspect.isfunction(raw):
            name = "_task" if "_task" not in signature.parameters else "_the_task"
            task = inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
            bound = list(signature.parameters.values())[1 if isinstance(raw, classmethod) else 0 :]
            signature = signature.replace(parameters=[task, *bound])
        wrapper.__signature__ = signature  # type: ignore[attr-defined]
    setattr(wrapper, _OURS, wrapper)
    return wrapper


def is_wrapped(raw: Any) -> bool:
    """Tell whether `raw` is one of ours; a decorator that copies our attributes (functools.wraps) is not."""
    return getattr(raw, _OURS, None) is raw


def is_database_task(task: Any) -> bool:
    """Tell whether requests of `task` run in a unit of work: rooms below the class know a DatabaseTask by that."""
    return is_wrapped(inspect.getattr_static(type(task), "run"))


def async_tasks(app: Any) -> set[str]:
    """Return the names of the `async def` tasks of `app`."""
    return {name for name, task in app.tasks.items() if getattr(task, "is_async", False) and is_database_task(task)}
