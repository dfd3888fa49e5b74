"""A task request, step by step: which unit of work it runs in, and how that ends.

arrive     Celery's tracer calls `run` (or the task's own `__call__`, which calls `run`)
enter      a request gets a unit of work of its own; a task called like a function joins its caller's
run        the task's code; `self.db` opens the Session, its first statement the connection
end        inside `run`, so that a failing COMMIT fails the task and `autoretry_for` sees it, and so that the next
           task of a chain is published after the COMMIT
release    the Session is closed, its connection is back in the connection pool
"""

from __future__ import annotations

import functools
import inspect
import logging
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery._state import _task_stack

from ..strategies.features.read_only import ReadOnlyError
from ..strategies.interrupts import hidden_interrupt, shield
from ..strategies.registry import Frame, frames
from ..strategies.sessions import shield_mapper_configuration
from ..strategies.unit_of_work import Label
from . import apps
from . import isolation as again
from .injection import Place, hidden, injected_parameters, injecting, places_of

if TYPE_CHECKING:
    from .extension import Alchemy
    from .task import DatabaseTask

logger = logging.getLogger(__name__)

#: Key in the `__dict__` of a request whose `run` has begun. A task that calls itself gets a copy of the request, key
#: included, and so is told apart from a request that the tracer has just made.
_BEGUN = "_celery_alchemy_begun"
#: The same for a task's own `__call__`: `Task.__call__` runs `run` under a copy of the request.
_CALLED = "_celery_alchemy_called"
_SOFT_LIMIT_SIGNAL = getattr(signal, "SIGUSR1", None)
_OURS = "_celery_alchemy_wrapper"
_PLACES = "_celery_alchemy_places"

#: Opens or joins a unit of work for the task; None: it runs in the one that is open already, whoever ends that.
Enter = Callable[["Alchemy", "DatabaseTask", Any, bool], "Frame | None"]


def wrap_run(raw: Any) -> Callable[..., Any]:
    """Return `raw`, a task's `run` as it stands in the class body, inside the unit of work of the task request."""
    call = _caller(raw)

    @shield.covers
    def run(self: DatabaseTask, /, *args: Any, **kwargs: Any) -> Any:
        retries = again.allowed(self)
        if retries <= 0 or not _ends_transaction(self):
            return _run(_enter_run, call, self, args, kwargs)
        request = _request(self)

        def begin_again() -> None:
            if request is not None:
                request.__dict__.pop(_BEGUN, None)

        def attempt(*, first: bool, last: bool) -> Any:
            return _run(_enter_run, call, self, args, kwargs, first=first, last=last)

        return again.run_again(attempt, begin_again, self, retries)

    wrapper = _like(run, raw)
    if names := injected_parameters(raw):
        signature = inspect.signature(wrapper)
        places = places_of(signature, names)
        call = injecting(call, places)
        wrapper.__signature__ = hidden(signature, names)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {name: one for name, one in wrapper.__annotations__.items() if name not in names}
        setattr(wrapper, _PLACES, places)
    return wrapper


def _ends_transaction(task: DatabaseTask) -> bool:
    """Tell whether `run`, called now, has a transaction of its own: called like a function it may be its caller's."""
    db = apps.find(task.app)
    return _is_traced(_request(task)) or (db is not None and db.units.current_frame() is None)


def injected_places(run: Callable[..., Any]) -> list[Place]:
    """Return where `wrap_run` passes the Session to what it has wrapped."""
    return getattr(run, _PLACES, [])


def wrap_call(raw: Any) -> Callable[..., Any]:
    """Return `raw`, a task's own `__call__`, inside the unit of work that the `run` it calls will end."""
    call = _caller(raw)

    @shield.covers
    def __call__(self: DatabaseTask, /, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return _run(_enter_call, call, self, args, kwargs)

    return _like(__call__, raw)


def wrap_hook(name: str, raw: Any) -> Callable[..., Any]:
    """Return `raw`, one of Celery's task hooks, inside a unit of work of its own, committed when it returns."""
    call = _caller(raw)

    @shield.covers
    def enter_hook(db: Alchemy, task: DatabaseTask, request: Any, traced: bool) -> Frame | None:
        top = frames.top()
        if top is not None and top.kind == "hook" and top.holder is task:
            return None  # super().on_failure(...): the same hook, the same unit of work
        label = f"{name} of {task.name}"
        return db.units.begin(label, commits=True, kind="hook", holder=task, request=request)

    @shield.covers
    def hook(self: DatabaseTask, /, *args: Any, **kwargs: Any) -> Any:
        return _run(enter_hook, call, self, args, kwargs)

    return _like(hook, raw)


@shield.covers
def _run(
    enter: Enter,
    call: Callable[..., Any],
    task: DatabaseTask,
    args: Any,
    kwargs: Any,
    *,
    first: bool = True,
    last: bool = True,
) -> Any:
    """Run `call` in the unit of work that `enter` opens or joins, and end it.

    Where this is not the `last` attempt of the request, a conflict with another transaction does not end it.

    Raises:
        again.Lost: such a conflict.

    Under prefork a soft time limit may strike between any two bytecodes. It is held back but for the task's own code:
    so either the transaction is committed and the task succeeds, or it is rolled back and the limit raised.
    """
    db: Alchemy | None = apps.find(task.app)
    if db is None:
        return call(task, *args, **kwargs)  # `self.db` says so; a task that touches no database needs none
    strategy = db.strategy
    # billiard installs its handler after worker_process_init, so the first task is the first chance.
    if strategy.forks and _SOFT_LIMIT_SIGNAL is not None and shield.install(_SOFT_LIMIT_SIGNAL):
        shield_mapper_configuration()
        shield.is_over = _is_over
    deferring = shield.installed and shield.applies
    request = _request(task)
    traced = _is_traced(request)
    is_workers = traced and not request.is_eager and _CALLED not in request.__dict__
    stack = frames.get()
    if stack and is_workers and not any(found.request is request for found in stack):
        db.units.sweep()
    if is_workers and deferring and first:
        shield.reset()  # what came too late for the request before is not for this one
    held = shield.depth
    goes_on = False
    frame: Frame | None = None
    error: BaseException | None = None
    try:
        if deferring:
            shield.depth = held + 1
        frame = enter(db, task, request, traced)
        if not last and frame is not None:
            frame.unit.notes_commits = True
        try:
            if deferring:
                shield.depth = held
                shield.check()
            result = call(task, *args, **kwargs)
            if deferring:
                if frame is not None and frame.ends:
                    frame.unit.prepare()
                shield.depth = held + 1
        except BaseException as raised:
            if deferring:
                shield.depth = held + 1
            error = raised
            if frame is not None and frame.ends:
                frame.unit.fail(raised)
            hidden = hidden_interrupt(raised) if deferring else None
            if hidden is not None:
                error = hidden
                raise hidden from None
            raise
        if frame is not None and frame.ends:
            try:
                frame.unit.succeed(final=frame.owns)
            except BaseException as raised:
                error = raised
                raise
        return result
    except Exception as raised:
        goes_on = not last and frame is not None and again.may_run_again(error, frame.unit)
        if goes_on:
            raise again.Lost from raised
        raise
    finally:
        if frame is not None:
            if frame.owns and frames.top() is not frame:
                _leave_inner(frame)
            frame.owner.leave(frame, error)
        error = None  # no cycle: exception -> traceback -> this frame -> exception
        if deferring:
            shield.depth = held
            if is_workers and frame is not None and frame.owns and frame.kind != "hook" and not goes_on:
                shield.pending = None  # what it would stop is over
                shield.ended = request.id
            elif frame is None or frame.owns or not frame.ends:  # else the `__call__` around it ends the request
                shield.check()


def _is_over(request_id: str) -> bool:
    """Tell whether Celery has begun nothing since the request with this id: it stores the result, or waits."""
    task = _task_stack.top
    request = task.request_stack.top if task is not None else None
    return request is None or request.id == request_id


def _leave_inner(frame: Frame) -> None:
    """End what the task left open: a block in a generator that somebody still holds, an ExitStack never closed."""
    for inner in frame.owner.above(frame):
        logger.warning("%s left %s open; it is rolled back", frame.unit.label, inner.unit.label)
        frame.owner.leave(inner)


@shield.covers
def _enter_run(db: Alchemy, task: DatabaseTask, request: Any, traced: bool) -> Frame | None:
    if traced:
        top = frames.top()
        if top is not None and top.kind == "call" and top.owns and top.holder is task:
            request.__dict__[_BEGUN] = True
            return db.units.join(top, kind="run", holder=task, request=request, ends=True)
        frame = _begin(db, task, request, "run")
        request.__dict__[_BEGUN] = True
        return frame
    current = db.units.current_frame()
    if current is not None:
        _refuse_other_mode(current, task)
        return db.units.join(current, kind="run", holder=task, request=request)
    return _begin(db, task, request, "run")


def _refuse_other_mode(frame: Frame, task: DatabaseTask) -> None:
    """A task that is called like a function works in the transaction of its caller, or there is none for either."""
    pooled = bool(frame.unit.read_only and task.read_only) and frame.unit.strategy.engines.terms.external_pooler
    if frame.unit.read_only != task.read_only and not pooled:
        raise ReadOnlyError(
            f"{task.name} has read_only={task.read_only!r} and was called like a function inside {frame.unit.label}, "
            f"which has read_only={frame.unit.read_only!r}: a task that is called so works in the transaction of its "
            f"caller. Give both the same, or send the task with delay()."
        )


@shield.covers
def _enter_call(db: Alchemy, task: DatabaseTask, request: Any, traced: bool) -> Frame | None:
    if not traced:
        # Called like a function: it joins what is open, and `run` will join it.
        return None if db.units.current_frame() is not None else _begin(db, task, request, "call")
    for frame in frames.get() or ():
        if frame.kind == "call" and frame.request is request:
            return None  # super().__call__() of another base: the same call, the same unit of work
    request.__dict__[_CALLED] = True
    return _begin(db, task, request, "call")


def _request(task: DatabaseTask) -> Any:
    """Return the request on top of the task's stack; None when it was not even called."""
    stack = task.request_stack
    return stack.top if stack is not None else None


def _begin(db: Alchemy, task: DatabaseTask, request: Any, kind: str) -> Frame:
    commits = task.commit_on_success
    if commits is None:
        commits = db.settings.commit_on_success
    return db.units.begin(
        _label(request, task), commits=commits, kind=kind, holder=task, request=request, read_only=task.read_only
    )


def _is_traced(request: Any) -> bool:
    """Tell whether Celery's tracer runs this request, in a worker or eagerly, and its `run` has not begun yet."""
    return request is not None and not request.called_directly and _BEGUN not in request.__dict__


def _label(request: Any, task: DatabaseTask) -> Label:
    return (task.name, request.id) if request is not None and request.id else f"{task.name}()"


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
