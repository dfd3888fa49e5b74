"""Which threads and greenlets run a task of the worker, and how many of them there are."""

from __future__ import annotations

from celery.worker import state

from ..strategies.registry import RunningScope
from ..strategies.scope import Scope
from ..strategies.worker_pool import WorkerPool, outside_worker
from ._celery import outermost_request


class RunningTasks(RunningScope):
    """What Engines ask about the thread or greenlet that is running, in a worker.

    A thread that a task has started is no task of the worker's, whatever it runs: a `unit_of_work()`, another task that
    is called like a function, `apply()`.
    """

    worker_pool: WorkerPool = outside_worker()

    def waits_in_line(self, scope: Scope, connections: int) -> bool:
        """Tell whether a task runs here, and there are more of those than `connections`: they compete for them."""
        if not self.worker_pool.implementation:
            return super().waits_in_line(scope, connections)
        request = outermost_request()
        if request is None or request.called_directly or request.is_eager:
            return False
        running = 1 if self.worker_pool.forks else len(state.active_requests)
        return running > connections
