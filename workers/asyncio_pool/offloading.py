"""Results are stored and messages sent by threads, while the task's greenlet waits and the event loop goes on.

Celery's tracer is synchronous code that runs on the loop's thread: where it talks to a result backend or to a broker,
it would stop every other task, for minutes where the server does not answer.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from typing import Any

from celery.backends.base import Backend
from kombu.pools import ProducerPool
from sqlalchemy.util import await_only, concurrency

from ...strategies.interrupts import current_interruption
from .threads import Threads

#: Methods of a result backend that talk to its server.
BLOCKING = frozenset(
    (
        *("add_to_chord", "apply_chord", "cleanup", "delete_group", "forget", "get_children", "get_group_meta"),
        *("get_many", "get_result", "get_state", "get_status", "get_task_meta", "get_traceback", "iter_native"),
        *("join_native", "mark_as_done", "mark_as_failure", "mark_as_retry", "mark_as_revoked", "mark_as_started"),
        *("on_chord_part_return", "process_cleanup", "reload_group_result", "reload_task_result", "restore_group"),
        *("save_group", "store_result", "wait_for", "wait_for_pending", "chord_error_from_stack"),
        *("fail_from_current_stack", "get", "set", "mget", "delete", "incr", "expire"),
    )
)
CHILDREN = 8
"""Publishes of child coroutines, each of which is inside the one before: in a signal handler, for example."""
RETRY_S = 0.01
"""A coroutine that finds all producers in use asks again after this time."""


def may_wait() -> bool:
    """Tell whether this is the greenlet of a task request on the loop, which can wait while the loop goes on."""
    return concurrency.in_greenlet() and current_interruption.get() is not None


class OffloadedBackend:
    """Stands for the result backend in the loop's thread: a task request that calls what blocks waits for a thread.

    Args:
        backend: The one of the loop's thread, for everything else.
        of_thread: Returns the backend of the thread that calls it: a backend need not be safe for threads.
    """

    def __init__(self, backend: Any, of_thread: Callable[[], Any], threads: Threads) -> None:
        self._real, self._of_thread, self._threads = backend, of_thread, threads
        self._cleans_up = type(backend).process_cleanup is not Backend.process_cleanup

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._real)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        return functools.partial(self._call, name) if name in BLOCKING and callable(found) else found

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, **more: Any
    ) -> Any:
        stores = store_result and not (request is not None and request.ignore_result)
        if stores or (request is not None and request.chord):
            return self._call("mark_as_done", task_id, result, request, store_result, **more)
        return None

    def process_cleanup(self) -> Any:
        return self._call("process_cleanup") if self._cleans_up else None

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if not may_wait():
            return getattr(self._real, name)(*args, **kwargs)
        return await_only(self._threads.run(functools.partial(self._in_thread, name, args, kwargs)))

    def _in_thread(self, name: str, args: Any, kwargs: Any) -> Any:
        return getattr(self._of_thread(), name)(*args, **kwargs)


class OffloadedProducer:
    """Stands for a producer of Kombu's: `publish` waits for a thread."""

    def __init__(self, producer: Any, threads: Threads) -> None:
        self._producer, self._threads = producer, threads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, *args: Any, **kwargs: Any) -> Any:
        publish = functools.partial(self._producer.publish, *args, **kwargs)
        return await_only(self._threads.run(publish)) if may_wait() else publish()

    def __enter__(self) -> OffloadedProducer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._producer.release()


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


def _acquired(resources: Any, block: bool) -> Any:
    """Acquire one of them; the loop goes on until one is free."""
    while True:
        try:
            return resources.acquire(block=False)
        except resources.LimitExceeded:
            if not block:
                raise
        await_only(asyncio.sleep(RETRY_S))
