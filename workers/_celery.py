"""Everything private of Celery that cannot be avoided, in one place.

Tried on Celery 5.5.0, 5.6 and 5.7.0. Each function says what breaks without it.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType
from typing import Any

from celery import VERSION, Celery, Task
from celery._state import _task_stack, task_join_will_block
from celery.app import base
from celery.app import task as task_module

#: Whether the message or the task decides; None before Celery 5.7.
get_actual_ignore_result: Callable[[Any, Any], bool] | None = getattr(task_module, "get_actual_ignore_result", None)


def running_request() -> Any:
    """Return the request that this thread runs; None where it runs none.

    `celery.current_task` is a proxy whose `request` outside of a task is a shared default object.
    """
    task = _task_stack.top
    return task.request_stack.top if task is not None else None


def running_requests() -> list[Any]:
    """Return every request that this thread or greenlet is inside of: a task may call another like a function."""
    return [request for task in _task_stack.stack for request in task.request_stack.stack]


def outermost_request() -> Any:
    """Return the request that this thread or greenlet has begun with; None where it runs none.

    `app.current_worker_task` is the innermost one, and takes an eager one for the worker's.
    """
    tasks = _task_stack.stack
    requests = tasks[0].request_stack.stack if tasks else ()
    return requests[0] if requests else None


#: Returns what the stack of requests of a task keeps for each thread or greenlet. `task.request_stack.top` finds the
#: request too, through an attribute that is missing, and each task would pay 7,000 instructions for it. Raises
#: AttributeError where the environment variable USE_FAST_LOCALS is set.
requests_of = operator.attrgetter("request_stack._local")


def is_spawned() -> bool:
    """Tell whether this process is a pool process that was started as a fresh interpreter: it gets another app object,
    and no `worker_init`."""
    return bool(base.USING_EXECV)


def is_result_ignored(task: Any, request: Any) -> bool:
    """Tell whether the result of this request is stored nowhere; Celery's own function, where it has one."""
    if get_actual_ignore_result is not None:
        return bool(get_actual_ignore_result(task, request))
    return bool(task.ignore_result or request.ignore_result)


def pickles_results(backend: Any) -> bool:
    """Tell whether `backend` is Celery's database backend before 5.7, which pickles results whatever it is told."""
    module = sys.modules.get("celery.backends.database")
    return (
        module is not None
        and isinstance(backend, module.DatabaseBackend)
        and not hasattr(module.DatabaseBackend, "_decode_stored_result")
    )


def conf_so_far(app: Celery) -> Any:
    """Return the settings of `app` without reading its configuration, which `app.conf` would; None: there are none yet.

    Without it, an Alchemy would read the configuration where it is made, before the user's code has finished it.
    """
    return app._conf


def running_task() -> Any:
    """Return the task that this thread or greenlet runs; None where it runs none."""
    return _task_stack.top


def concurrency_now(worker: Any) -> int | None:
    """Return the most tasks that `worker` can run at one time as it is now: `pool_grow`, `pool_shrink` and `autoscale`
    change it. None before its worker pool has started.

    `worker.concurrency` stays what it was at the start.
    """
    autoscaler = getattr(worker, "autoscaler", None)
    try:
        return int(worker.pool.num_processes if autoscaler is None else autoscaler.max_concurrency)
    except AttributeError:  # prefork looks at the pool that its start makes
        return None


def known_task(app: Celery, name: str) -> Any:
    """Return the task `name` of `app` where it is there already; `app.tasks` would finalise the app."""
    return app._tasks.get(name)


def pydantic_dump(cls: Any) -> Callable[..., Any] | None:
    """Return what turns the pydantic models among a caller's arguments into data; None for a task that has none.

    Celery 5.7 binds the arguments to all parameters first, and would miss one that is injected.
    """
    found: Callable[..., Any] | None = cls.__dict__.get("_dump_pydantic_arguments")
    return found


def set_pydantic_dump(cls: Any, dump: Callable[..., Any]) -> None:
    """Replace what `pydantic_dump` returns."""
    cls._dump_pydantic_arguments = staticmethod(dump)


def watch_tasks(app: Celery, made: Callable[[Any], object]) -> None:
    """Call `made(task)` for each task of `app`: those that are there, and those that are made later.

    Celery has no signal for a task that is made; `on_bound` of a task class is not ours to define where the task is no
    DatabaseTask. `_task_from_fun` is what `app.task` and `shared_task` call.
    """
    make, register = app._task_from_fun, app.register_task

    def task_from_fun(*args: Any, **options: Any) -> Any:
        task = make(*args, **options)
        made(task)
        return task

    def register_task(*args: Any, **options: Any) -> Any:
        task = register(*args, **options)
        made(task)
        return task

    def finalised(sender: Any, **_: Any) -> None:
        for task in list(sender._tasks.values()):
            made(task)

    app._task_from_fun, app.register_task = task_from_fun, register_task
    app.on_after_finalize.connect(finalised, weak=False)
    finalised(app)


_MISSING = object()
#: What `apply_async` reads of a task; all else it is given.
_read_of = operator.attrgetter("_exec_options", "ignore_result", "soft_time_limit", "time_limit", "shadow_name")


class KnownCall:
    """What `apply_async` of a task gives to `send_task`, for a message without options: Celery has been asked once.

    It finds the same for each message, and to look up `task_always_eager` alone costs it 39,000 instructions: each
    place that does not have it is an exception, by each of its names. Where something has changed that it reads, `fits`
    says so, and it is asked again.

    Args:
        options: What it has given to `send_task`, but for what belongs to one message.
    """

    __slots__ = ("_apply_async", "_conf", "_eager", "_read", "_task", "options")
    options: dict[str, Any]

    def __init__(self, task: Any, options: dict[str, Any]) -> None:
        self._task, self._apply_async, self._read = task, Task.apply_async, _read_of(task)
        self._conf = conf = task.app.conf
        self._eager = tuple(dict.fromkeys(conf._key(key) for key in conf._to_keys("task_always_eager")))
        self.options = options

    def fits(self, task: Any, app: Celery) -> bool:
        """Tell whether `apply_async` of `task` would give the same today."""
        conf = self._conf
        if (
            task is not self._task
            or app._conf is not conf
            or Task.apply_async is not self._apply_async
            or _read_of(task) != self._read
        ):
            return False
        for mapping in conf.maps:  # as `conf.task_always_eager` does, without the exceptions
            for key in self._eager:
                value = mapping.get(key, _MISSING)
                if value is not _MISSING:
                    return not value
        return False


#: The newest Celery whose `apply_async` was read for what it reads: one that reads more is asked for each message.
_READ_UP_TO = (5, 7)


def can_be_known(task: Any) -> bool:
    """Tell whether all that makes a `KnownCall` is Celery's own; tracing agents put functions around `apply_async`,
    which want each message."""
    if VERSION[:2] > _READ_UP_TO:
        return False
    function, cls = Task.apply_async, type(task)
    own = type(function) is FunctionType and function.__globals__ is vars(task_module)
    return own and cls.shadow_name is Task.shadow_name and cls._get_exec_options is Task._get_exec_options


class LooseConnection:
    """Stands where `send_task` asks a producer for its connection, to give its errors a type of kombu's, and for those
    after which Celery 5.7 publishes again what its tracer sends; it has none."""

    recoverable_connection_errors: tuple[type[Exception], ...] = ()

    def _reraise_as_library_errors(self) -> AbstractContextManager[None]:
        return nullcontext()


def expect_no_result_yet(backend: Any, capturing: type) -> None:
    """Let `backend` not prepare for the result of a message that is only captured by a producer of the class
    `capturing`.

    `send_task` asks it to, before it publishes: the Redis backend subscribes, RPC declares its queue. Without it, the
    call would connect to them, and would be left with what it prepared for a message that is rolled back.
    """
    prepare = backend.on_task_call
    if getattr(prepare, "_celery_alchemy", False):
        return

    def on_task_call(producer: Any, task_id: str) -> Any:
        return {} if isinstance(producer, capturing) else prepare(producer, task_id)

    on_task_call._celery_alchemy = True  # type: ignore[attr-defined]
    backend.on_task_call = on_task_call


def expects_results() -> bool:
    """Tell whether Celery's result backends prepare for the result of a message that is sent now. They do not where no
    task may wait for one: in a worker, outside of `allow_join_result()`."""
    return not task_join_will_block()


def uses_fast_locals() -> bool:
    """Tell whether Celery keeps the requests of a thread in thread-locals (the environment variable USE_FAST_LOCALS):
    all coroutines of an event loop would share them."""
    return not hasattr(_task_stack, "__ident_func__")


def identify_by(identity: Callable[[], Any], task: Any = None) -> None:
    """Let `current_task`, or `task.request`, be found by what `identity` returns, instead of thread or greenlet.

    Without it, child coroutines and threads that a coroutine starts would not see the request that they work for.
    """
    if task is None:
        _task_stack.__ident_func__ = identity
    elif task.request_stack.__ident_func__ is not identity:
        task.request_stack.__ident_func__ = identity


def run_of(task: Any) -> tuple[str, Callable[..., Any]]:
    """Return the function of the task and the name of the attribute that holds it: `autoretry_for` puts one around it,
    which must see the error."""
    return ("_orig_run", task._orig_run) if hasattr(task, "_orig_run") else ("run", task.run)


def put_backend(app: Celery, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    """Let `app.backend` in this thread be `wrap(backend)`: in all threads where all share one
    (`result_backend_thread_safe`). Call what is returned to undo it.

    Celery keeps one backend for each thread, and has no public way to say which.
    """
    backend = app.backend
    if app._backend_cache is not None:
        app._backend_cache = wrap(backend)
        return lambda: setattr(app, "_backend_cache", backend)
    app._local.backend = wrap(backend)
    return lambda: None  # it ends with its thread


def put_producer_pool(app: Celery, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    """Let `app.producer_pool` be `wrap(pool)`. Call what is returned to undo it."""
    amqp, pool = app.amqp, app.amqp.producer_pool
    amqp._producer_pool = wrap(pool)
    return lambda: setattr(amqp, "_producer_pool", pool)


def put_connection_pool(app: Celery, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    """Let `app.pool` be `wrap(pool)`. Call what is returned to undo it."""
    pool = app.pool
    app._pool = wrap(pool)
    return lambda: setattr(app, "_pool", pool)


def was_revoked(request: Any) -> bool:
    """Tell whether the worker has told the world that this request is revoked, and acknowledged it."""
    return bool(request._already_revoked)


def settle_by(request: Any, call: Callable[..., None]) -> None:
    """Let `call(function, *args)` do what acknowledges and rejects the message of `request`, in another thread.

    Callbacks of Celery's go along with it, which ask the broker's connection for something and wait for the answer: it
    belongs to the consumer's thread.
    """
    for name in ("_on_ack", "_on_reject"):
        setattr(request, name, functools.partial(call, getattr(request, name)))


def serve_while_stopping(hub: Any) -> None:
    """Send the acknowledgements that wait in `hub`, and the heartbeats that are due: when a worker stops, its loop has
    ended, and tasks may take long. Called in the thread of that loop.

    Without it, what has ended would be run again if the process were killed while it waits for the last task, and
    RabbitMQ would close a connection without heartbeats.
    """
    for _ in range(3):  # what is called there makes Celery call something there, which acknowledges
        for callback in hub._pop_ready() if hasattr(hub, "_pop_ready") else ():
            callback()
    hub.fire_timers()


@contextmanager
def working_as(task: Any, request: Any) -> Iterator[None]:
    """Let `task` be the current task, and `request` its request, for the block."""
    _task_stack.push(task)
    if request is not None:
        task.request_stack.push(request)
    try:
        yield
    finally:
        if request is not None:
            task.request_stack.pop()
        _task_stack.pop()


def working_on(task: Any, request: Any, function: Callable[[], Any]) -> Any:
    """Call `function` in the thread of an event loop as `request` of `task`, which another thread waits for: it is the
    current task there too."""
    with working_as(task, request):
        return function()
