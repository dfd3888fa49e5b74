"""How many connections a process needs, from the worker pool and its concurrency."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy.engine import URL

from ..worker_pool import NO_WORKER, WorkerPool

#: Greenlets and coroutines are many and cheap, connections are neither: they queue for these.
GREEN_CONNECTIONS = 20


@dataclass(frozen=True, slots=True)
class PoolSize:
    """The size of one process's connection pool. Connections open at one time: at most the sum of the three."""

    pool_size: int
    """Connections kept open."""
    max_overflow: int = 0
    """Connections opened beyond `pool_size` when all are in use, and closed when they come back; -1: no limit."""
    reserve: int = 0
    """Connections that only a nested unit of work may open: its thread or greenlet already holds one, so that waiting
    could be waiting for itself."""

    @property
    def total(self) -> int | None:
        """The most connections of one process; None without a limit."""
        return None if self.max_overflow < 0 else self.pool_size + self.max_overflow + self.reserve

    def __str__(self) -> str:
        text = f"{self.pool_size}"
        if self.max_overflow:
            text += " + unlimited overflow" if self.max_overflow < 0 else f" + {self.max_overflow} overflow"
        if self.reserve:
            text += f" + {self.reserve} reserved for nested units of work"
        return text


def tasks_may_queue(worker_pool: WorkerPool, size: PoolSize) -> bool:
    """Tell whether the tasks of one process can be more than its connections, so that they queue for them, and have
    slots in reserve that they need not queue for."""
    return size.reserve > 0 and 0 <= size.max_overflow < worker_pool.tasks_per_process - size.pool_size


def size_for(worker_pool: WorkerPool, url: URL, engine_options: dict[str, Any], databases: int = 1) -> PoolSize:
    """Return the size of one process's connection pool; what the user set in `engine_options` wins.

    prefork and solo run one task at a time per process, threads one per thread; gevent, eventlet and asyncio share
    `min(concurrency, 20)`. Each gets as many slots again in reserve, so that every task can open one nested unit of
    work. Who sets `max_overflow` has said what may come on top, and there is no reserve. A process outside a worker
    gets SQLAlchemy's own defaults (5 + 10).

    Args:
        databases: How many the app has. Greenlets that hold a connection of one must not queue for one of another, so
            each has slots in reserve for all of these.
    """
    if worker_pool.name == NO_WORKER:
        default = PoolSize(pool_size=5, max_overflow=10)
    elif worker_pool.takes_turns and url.get_backend_name() == "sqlite":
        # Waiting for a lock of SQLite blocks all greenlets, its holder included, and is no queue: let them queue here.
        # A coroutine does not block the others, so it may have a second connection.
        default = PoolSize(pool_size=1, reserve=0 if worker_pool.is_green else 1)
    else:
        tasks = worker_pool.tasks_per_process
        busy = min(tasks, GREEN_CONNECTIONS) if worker_pool.takes_turns else tasks
        default = PoolSize(pool_size=busy, reserve=busy)
    pool_size = engine_options.get("pool_size", default.pool_size)
    if "max_overflow" in engine_options or pool_size == 0:
        # pool_size=0 is SQLAlchemy's spelling of "no limit".
        return PoolSize(pool_size, -1 if pool_size == 0 else engine_options["max_overflow"], 0)
    if "pool_size" in engine_options:
        default = PoolSize(pool_size, default.max_overflow, pool_size if default.reserve else 0)
    if databases > 1 and tasks_may_queue(worker_pool, default):
        default = replace(default, reserve=default.reserve * databases)
    return default
