"""A task request in its unit of work, step by step.

arrive     Celery's tracer calls `run` (or the task's own `__call__`, which calls `run`)
enter      a request gets a unit of work of its own; a task called like a function joins its caller's
run        the task's code; `self.db` opens the Session, its first statement the connection
end        inside `run`, so that a failing COMMIT fails the task and `autoretry_for` sees it, and so that the next
           task of a chain is published after the COMMIT
release    the Session is closed, its connection is back in the connection pool
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from ..strategies.entry import Entry, Label, UnitOptions
from ..strategies.features.read_only import ReadOnlyError
from ..strategies.registry import UnitOfWorkRegistry, innermost_entry, open_entries
from ._celery import requests_of
from .results import FLAT, LARGE, checked, refuse_unencodable

logger: logging.Logger = logging.getLogger(__name__)

#: Key in the `__dict__` of a request whose `run` has begun. A task that calls itself gets a copy of the request, key
#: included, and so is told apart from a request that the tracer has just made.
_BEGUN = "_celery_alchemy_begun"
#: The same for a task's own `__call__`: `Task.__call__` runs `run` under a copy of the request.
_CALLED = "_celery_alchemy_called"

#: A function of the user's; the arguments that come with it include the task where it takes that.
Call = Callable[..., Any]
#: Opens or joins a unit of work for the task; None: it runs in the one that is open already, whoever ends that.
Enter = Callable[[Any], "Entry | None"]


class RequestRunner:
    """Runs the requests of one task in units of work; made once for each task, when it first runs.

    Args:
        registry: Of the app's default database.
        options: How the units of work of this task are treated.
        hook_options: How those of its hooks are.
    """

    first = True
    """False where the body of the same request has run before (`isolation_retries`)."""
    goes_on: Callable[[BaseException | None], bool] = staticmethod(lambda error: False)
    """Tells whether the body will run again after this error."""

    def __init__(self, registry: UnitOfWorkRegistry, options: UnitOptions, hook_options: UnitOptions) -> None:
        self.registry = registry
        self.options = options
        self.hook_options = hook_options

    def run(self, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        """Run `call`, the task's `run`."""
        try:
            local = requests_of(task)
            request = local.__storage__[local.__ident_func__()]["stack"][-1]
        except (AttributeError, LookupError):
            request = request_of(task)
        marks = request.__dict__ if request is not None else None
        if marks is None or request.called_directly or _BEGUN in marks or _CALLED in marks:
            return self.inside(self.enter_run, call, task, args, kwargs)
        marks[_BEGUN] = True  # as begin_run, one call less
        unit = self.registry.begin(self.options, (task.name, request.id), "run", task, request)
        try:
            try:
                result = call(*args, **kwargs)
                kind = type(result)
                if kind not in FLAT and not (
                    (kind is str and result.isascii()) or (kind is int and -LARGE < result < LARGE)
                ):
                    refuse_unencodable(task, request, result)
            except BaseException as error:
                unit.fail(error)
                raise
            unit.succeed(final=True)
            return result
        finally:
            if unit.scope.units[-1] is not unit:
                leave_inner(self.registry, unit)
            self.registry.leave(unit)

    def run_call(self, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        """Run `call`, the task's own `__call__`, in the unit of work that the `run` it calls will end."""
        return self.inside(self.enter_call, call, task, args, kwargs)

    def run_hook(self, name: str, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        """Run `call`, one of Celery's hooks, in a unit of work of its own, committed when it returns."""
        return self.inside(functools.partial(self.enter_hook, name), call, task, args, kwargs)

    def inside(self, enter: Enter, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        """Run `call` in the unit of work that `enter` opens or joins, and end it."""
        entry = enter(task)
        if entry is None:
            return call(*args, **kwargs)
        try:
            try:
                result = call(*args, **kwargs)
                if type(result) not in FLAT:
                    result = checked(entry, task, result)
            except BaseException as error:
                if entry.ends:
                    entry.fail(error)
                raise
            if entry.ends:
                entry.succeed(final=entry.owns)
            return result
        finally:
            if entry.scope.units[-1] is not entry:
                leave_inner(self.registry, entry)
            self.registry.leave(entry)

    # -- which unit of work ------------------------------------------------------------------------------------------

    def begin_run(self, request: Any, task: Any) -> Entry:
        """Begin the unit of work of `request`, which Celery's tracer runs now."""
        request.__dict__[_BEGUN] = True
        return self.registry.begin(self.options, (task.name, request.id), "run", task, request)

    def enter_run(self, task: Any) -> Entry:
        """Return what `run` of `task`, called now, runs in."""
        request = request_of(task)
        if request is not None and not request.called_directly:
            marks = request.__dict__
            if _BEGUN not in marks:
                if _CALLED in marks:
                    top = innermost_entry()
                    if top is not None and top.kind == "call" and top.owns and top.holder is task:
                        marks[_BEGUN] = True
                        return self.registry.join(top, kind="run", holder=task, request=request, ends=True)
                return self.begin_run(request, task)
        current = self.registry.current_entry()
        if current is None:
            return self.registry.begin(self.options, label_of(request, task), "run", task, request)
        self._refuse_other_mode(current, task)
        return self.registry.join(current, kind="run", holder=task, request=request)

    def enter_call(self, task: Any) -> Entry | None:
        """Return what `__call__` of `task`, called now, runs in."""
        request = request_of(task)
        if not is_traced(request):
            # Called like a function: it joins what is open, and `run` will join it.
            if self.registry.current_entry() is not None:
                return None
            return self.registry.begin(self.options, label_of(request, task), "call", task, request)
        for entry in open_entries():
            if entry.kind == "call" and entry.request is request:
                return None  # super().__call__() of another base: the same call, the same unit of work
        request.__dict__[_CALLED] = True
        return self.registry.begin(self.options, label_of(request, task), "call", task, request)

    def enter_hook(self, name: str, task: Any) -> Entry | None:
        """Return what the hook `name` of `task`, called now, runs in."""
        top = innermost_entry()
        if top is not None and top.kind == "hook" and top.holder is task:
            return None  # super().on_failure(...): the same hook, the same unit of work
        label = f"{name} of {task.name}"
        return self.registry.begin(self.hook_options, label, "hook", task, request_of(task))

    def _refuse_other_mode(self, entry: Entry, task: Any) -> None:
        """A task that is called like a function works in the transaction of its caller, or there is none for either."""
        theirs, own = entry.unit.read_only, self.options.read_only
        if theirs != own:
            raise ReadOnlyError(
                f"{task.name} has read_only={own!r} and was called like a function inside {entry.unit.label}, "
                f"which has read_only={theirs!r}: a task that is called so works in the transaction of its "
                f"caller. Give both the same, or send the task with delay()."
            )


def leave_inner(registry: UnitOfWorkRegistry, entry: Entry) -> None:
    """End what the task left open: a block in a generator that is still referenced, an ExitStack never closed."""
    for inner in registry.above(entry):
        logger.warning("%s left %s open; it is rolled back", entry.unit.label, inner.label)
        inner.registry.leave(inner)


def begin_again(task: Any) -> None:
    """Make the request of `task` look as if its body had not begun."""
    request = request_of(task)
    if request is not None:
        request.__dict__.pop(_BEGUN, None)


def request_of(task: Any) -> Any:
    """Return the request on top of the task's stack; None when it was not even called."""
    try:
        local = requests_of(task)
        return local.__storage__[local.__ident_func__()]["stack"][-1]
    except (AttributeError, LookupError):
        return task.request_stack.top if task.request_stack is not None else None


def is_traced(request: Any) -> bool:
    """Tell whether Celery's tracer runs this request, in a worker or eagerly, and its `run` has not begun yet."""
    return request is not None and not request.called_directly and _BEGUN not in request.__dict__


def is_over(request: Any) -> bool:
    """Tell whether the body of this request has begun; of one that left its unit of work, it has ended."""
    return request is not None and _BEGUN in request.__dict__


def is_called(request: Any) -> bool:
    """Tell whether the task has a `__call__` of its own, which runs, or has run, around the body of this request."""
    return _CALLED in request.__dict__


def is_workers(request: Any) -> bool:
    """Tell whether a worker runs this request, and neither its `run` nor its own `__call__` has begun."""
    if request is None or request.called_directly or request.is_eager:
        return False
    marks = request.__dict__
    return _BEGUN not in marks and _CALLED not in marks


def label_of(request: Any, task: Any) -> Label:
    """Return the name of the unit of work of this request."""
    return (task.name, request.id) if request is not None and request.id else f"{task.name}()"
