"""Results are stored and messages sent by threads, while the task's greenlet waits and the event loop goes on.

Celery's tracer is synchronous code that runs on the loop's thread: where it talks to a result backend or to a broker,
it would stop every other task, for minutes where the server does not answer.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.backends.base import Backend
from kombu.pools import ProducerPool
from sqlalchemy.util import await_only, concurrency

from ...strategies.interrupts import current_interruption
from .. import _celery
from .threads import Threads

logger: logging.Logger = logging.getLogger(__name__)

#: Methods of a result backend that talk to its server.
BLOCKING = frozenset(
    (
        *("add_to_chord", "cleanup", "delete_group", "forget", "get_children", "get_group_meta"),
        *("get_many", "get_result", "get_state", "get_status", "get_task_meta", "get_traceback", "iter_native"),
        *("join_native", "mark_as_done", "mark_as_failure", "mark_as_retry", "mark_as_revoked", "mark_as_started"),
        *("on_chord_part_return", "process_cleanup", "reload_group_result", "reload_task_result", "restore_group"),
        *("save_group", "store_result", "wait_for", "wait_for_pending", "chord_error_from_stack"),
        *("fail_from_current_stack", "get", "set", "mget", "delete", "incr", "expire", "set_chord_size"),
        *("fallback_chord_unlock", "task_result_exists", "begin_chord"),
    )
)
#: Methods by which a client is told of results: nothing is to be waited for, and one thread does them in their order.
LISTENING = frozenset(("add_pending_result", "add_pending_results", "remove_pending_result"))
MESSAGES = 10
"""Threads that publish, where `broker_pool_limit` is unlimited."""
CHILDREN = 8
"""Publishes of child coroutines, each of which is inside the one before: in a signal handler, for example."""
RETRY_S = 0.01
"""A coroutine that finds all producers in use asks again after this time."""


def may_wait() -> bool:
    """Tell whether this is the greenlet of a task request on the loop, which can wait while the loop goes on."""
    return concurrency.in_greenlet() and current_interruption.get() is not None


class Offloads:
    """Takes off the loop what talks to a result backend or a broker, until `undo`; made in the loop's thread.

    Args:
        results: The threads that store results.
        messages: Those that publish.
    """

    def __init__(self, app: Celery, results: Threads, messages: Threads) -> None:
        self._app, self._results, self._messages = app, results, messages
        self._listening = Threads(messages.starter, asyncio.get_running_loop(), "listening", 1, 1)
        self._undo: list[Callable[[], None]] = []
        self._undo += [
            _celery.put_backend(app, self._backend),
            _celery.put_producer_pool(app, self._producers),
            _celery.put_connection_pool(app, self._connections),
            self._put_broadcast(app.control),
        ]

    def _backend(self, backend: Any) -> Any:
        # With `result_backend_thread_safe` all threads have this one.
        of_thread = (lambda: backend) if backend.thread_safe else (lambda: self._app.backend)
        return OffloadedBackend(backend, of_thread, self._results, self._listening)

    def _put_broadcast(self, control: Any) -> Callable[[], None]:
        """Commands to workers (`revoke`, `inspect`) are sent, and answers waited for, by the threads that publish."""
        original, loops_thread = control.broadcast, threading.get_ident()

        @functools.wraps(original)
        def broadcast(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != loops_thread or not may_wait():
                return original(*args, **kwargs)
            return await_only(self._messages.run(functools.partial(original, *args, **kwargs)))

        control.broadcast = broadcast
        return lambda: control.__dict__.pop("broadcast", None)

    def _producers(self, producers: Any) -> Any:
        offloaded = OffloadedProducers(producers, self._messages)
        self._undo.append(offloaded.close)
        return offloaded

    def _connections(self, connections: Any) -> Any:
        offloaded = OffloadedConnections(connections)
        self._undo.append(offloaded.close)
        return offloaded

    def undo(self) -> None:
        """Put back what was there before, and close the connections of the loop."""
        for undo in self._undo:
            undo()
        self._undo = []
        self._listening.close()


class OffloadedBackend:
    """Stands for the result backend in the loop's thread: a task request that calls what blocks waits for a thread.

    Args:
        backend: The one of the loop's thread, for everything else.
        of_thread: Returns the backend of the thread that calls it: a backend need not be safe for threads.
        listening: The one thread that subscribes to results.
    """

    def __init__(self, backend: Any, of_thread: Callable[[], Any], threads: Threads, listening: Threads) -> None:
        self._real, self._of_thread, self._threads, self._listening = backend, of_thread, threads, listening
        self._loops_thread = threading.get_ident()
        # RPC's queue for results is that of the thread that asks first; messages name the one of this thread.
        getattr(backend, "oid", None)
        self._cleans_up = type(backend).process_cleanup is not Backend.process_cleanup

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._real)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if name in BLOCKING and callable(found):
            return functools.partial(self._call, name)
        return functools.partial(self._listen, found) if name in LISTENING else found

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, **more: Any
    ) -> Any:
        stores = store_result and not (request is not None and request.ignore_result)
        if stores or (request is not None and request.chord):
            return self._call("mark_as_done", task_id, result, request, store_result, **more)
        return None

    def apply_chord(self, header_result_args: Any, body: Any, **keywords: Any) -> Any:
        begins_here = getattr(self._real, "begins_here", None)
        if begins_here is None:
            return self._call("apply_chord", header_result_args, body, **keywords)
        # A chord of `alchemy://` may wait for the COMMIT of this request, which a thread does not see.
        return None if begins_here(header_result_args) else self._call("begin_chord", header_result_args)

    def on_task_call(self, producer: Any, task_id: str) -> Any:
        prepare = functools.partial(self._real.on_task_call, producer, task_id)
        if not (_celery.expects_results() and may_wait()):
            return prepare()
        # By the thread that subscribes to results. The message must not be sent before that is done.
        wait = producer.wait if isinstance(producer, OffloadedProducer) else await_only
        return wait(self._listening.run(prepare))

    def process_cleanup(self) -> Any:
        return self._call("process_cleanup") if self._cleans_up else None

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if not may_wait():
            return getattr(self._real, name)(*args, **kwargs)
        return await_only(self._threads.run(functools.partial(self._in_thread, name, args, kwargs)))

    def _listen(self, method: Callable[..., Any], results: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._loops_thread:
            return method(results, *args, **kwargs)
        # Called by `AsyncResult.__del__` too, wherever that comes.
        self._listening.run(functools.partial(method, results, *args, **kwargs)).add_done_callback(_retrieve)
        return results

    def _in_thread(self, name: str, args: Any, kwargs: Any) -> Any:
        return getattr(self._of_thread(), name)(*args, **kwargs)


class OffloadedProducer:
    """Stands for a producer of Kombu's: `publish` waits for a thread."""

    def __init__(self, producer: Any, threads: Threads) -> None:
        self._producer, self._threads = producer, threads
        self._working: asyncio.Future[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, *args: Any, **kwargs: Any) -> Any:
        publish = functools.partial(self._producer.publish, *args, **kwargs)
        return self.wait(self._threads.run(publish)) if may_wait() else publish()

    def wait(self, work: asyncio.Future[Any]) -> Any:
        """Wait for a thread that works with the producer; a task that is interrupted here leaves it at work."""
        self._working = work
        return await_only(asyncio.shield(work))

    def release(self) -> None:
        """Give the producer back, once no thread works with it any more: nobody else may use it meanwhile."""
        self._give_back(None)

    def _give_back(self, error: BaseException | None) -> None:
        working, self._working = self._working, None
        if working is not None and not working.done():
            working.add_done_callback(self._worked)
        elif error is None:
            self._producer.release()
        else:  # as Kombu's own producer does: it closes the connection, which may be broken, and may block
            self._threads.run(functools.partial(self._producer.__exit__, type(error), error, None)).add_done_callback(
                _retrieve
            )

    def _worked(self, work: asyncio.Future[Any]) -> None:
        self._give_back(None if work.cancelled() else work.exception())

    def __enter__(self) -> OffloadedProducer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._give_back(error)


class OffloadedProducers:
    """Stands for the app's `producer_pool`: a task request that finds all producers in use lets the loop go on.

    On the loop nothing may block until a producer, or its connection, is free: requests give them back there. So the
    loop has producers on connections of its own, and nothing but the loop's thread takes one.

    Args:
        threads: Those that publish.
    """

    def __init__(self, producers: Any, threads: Threads) -> None:
        self._producers, self._threads = producers, threads
        self._loops_thread = threading.get_ident()
        limits = {"requests": producers.limit, "children": CHILDREN}
        connection = producers.connections.connection
        self._connections = {name: connection.clone().Pool(limit) for name, limit in limits.items()}
        self._own = {name: ProducerPool(self._connections[name], limit=limit) for name, limit in limits.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producers, name)

    def acquire(self, block: bool = False, timeout: float | None = None) -> Any:
        if threading.get_ident() != self._loops_thread:
            return self._producers.acquire(block=block, timeout=timeout)
        if not may_wait():  # a child coroutine, which calls `delay()` outside of any greenlet
            return self._own["children"].acquire(block=False)
        return OffloadedProducer(_acquired(self._own["requests"], block), self._threads)

    def close(self) -> None:
        """Close the connections of the loop."""
        for resources in (*self._own.values(), *self._connections.values()):
            resources.force_close_all()


class OffloadedConnections:
    """Stands for the app's `pool`, from which Celery takes a connection for a command to workers: the same rule."""

    def __init__(self, connections: Any) -> None:
        self._connections = connections
        self._loops_thread = threading.get_ident()
        self._own = {name: connections.connection.clone().Pool(CHILDREN) for name in ("requests", "children")}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connections, name)

    def acquire(self, block: bool = False, timeout: float | None = None) -> Any:
        if threading.get_ident() != self._loops_thread:
            return self._connections.acquire(block=block, timeout=timeout)
        if not may_wait():
            return self._own["children"].acquire(block=False)
        return _acquired(self._own["requests"], block)

    def close(self) -> None:
        """Close the connections of the loop."""
        for connections in self._own.values():
            connections.force_close_all()


def _retrieve(done: asyncio.Future[Any]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.info("A client could not be told of a result: %s", error)


def _acquired(resources: Any, block: bool) -> Any:
    """Acquire one of them; the loop goes on until one is free."""
    while True:
        try:
            return resources.acquire(block=False)
        except resources.LimitExceeded:
            if not block:
                raise
        await_only(asyncio.sleep(RETRY_S))
