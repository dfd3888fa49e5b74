"""`celery inspect sessions` and `celery control recycle_connections`: what the workers are doing, and a fresh start."""

from __future__ import annotations

from typing import Any

from celery.worker.control import control_command, inspect_command

from .. import apps
from . import processes


@inspect_command(default_timeout=2.0)
def sessions(state: Any, **_: Any) -> Any:
    """Units of work that are open, connections, leaks, for each process."""
    db = apps.find(state.app)
    if db is None:
        return {"error": "the app of this worker has no Alchemy"}
    databases = {name: one.strategy for name, one in db.databases.items()}
    worker_pool = db.strategy.worker_pool
    return {
        "worker_pool": worker_pool.name,
        "concurrency": worker_pool.concurrency,
        "databases": {
            name: {"strategy": strategy.name, "max_connections": strategy.max_connections}
            for name, strategy in databases.items()
        },
        "processes": processes.reports(),
    }


@control_command()
def recycle_connections(state: Any, **_: Any) -> Any:
    """Close all connections: idle ones now, the others when they come back; the next statement connects anew."""
    if apps.find(state.app) is None:
        return {"error": "the app of this worker has no Alchemy"}
    processes.recycle()
    return {"ok": "idle connections are closed, the others when they come back"}
