"""What is known of the worker pool that runs the tasks of this process."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

GREEN_POOLS = frozenset({"gevent", "eventlet"})
ASYNCIO = "asyncio"


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """The worker pool in force, as read off the running worker, never off a setting."""

    name: str
    """`prefork`, `threads`, `gevent`, `eventlet`, `solo`, `asyncio`; `custom` for a class unrelated to these; `none`
    outside a worker (a script, a web process)."""
    implementation: str = ""
    """Module and qualified name of the pool class, with a colon between them; empty outside a worker."""
    concurrency: int = 1
    """The most task requests that run at one time in the whole worker; under autoscale its upper end."""
    start_method: str = "fork"
    """How prefork makes its pool processes: `fork` or `spawn`."""
    main_pid: int = field(default_factory=os.getpid)
    """The worker's main process."""

    @property
    def is_green(self) -> bool:
        """True for gevent and eventlet, and for a custom pool built on one of them."""
        return self.name in GREEN_POOLS

    @property
    def takes_turns(self) -> bool:
        """True where one thread runs all tasks of a process: they are many, and queue for fewer connections."""
        return self.is_green or self.name == ASYNCIO

    @property
    def forks(self) -> bool:
        """True when tasks run in pool processes apart from the main process."""
        return self.name == "prefork"

    @property
    def process_count(self) -> int:
        """Processes that run tasks: `concurrency` under prefork, else 1."""
        return self.concurrency if self.forks else 1

    @property
    def tasks_per_process(self) -> int:
        """The most task requests that run at one time in one process."""
        return 1 if self.forks else self.concurrency

    @property
    def in_main_process(self) -> bool:
        """True in prefork's main process: it runs hooks and error callbacks, no tasks, and forks again later."""
        return self.forks and os.getpid() == self.main_pid

    def resized(self, concurrency: int) -> WorkerPool:
        return replace(self, concurrency=concurrency)


NO_WORKER = "none"


def outside_worker() -> WorkerPool:
    """Return the WorkerPool of a process that is no worker."""
    return WorkerPool(name=NO_WORKER)
