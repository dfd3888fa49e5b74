"""`celery inspect sessions` and `celery control recycle_connections`: what the workers are doing, and a fresh start."""

from __future__ import annotations

from typing import Any

from celery.worker.control import control_command, inspect_command

from .. import apps
from . import growth, outbox, processes

NO_ALCHEMY = "the app of this worker has no Alchemy"


@inspect_command(default_timeout=2.0)
def sessions(state: Any, **_: Any) -> Any:
    """Units of work that are open, connections, leaks, for each process. The keys are the same in every answer."""
    db = apps.find(state.app)
    if db is None:
        return {"error": NO_ALCHEMY, "worker_pool": None, "concurrency": None, "databases": {}, "processes": [],
                "outbox": None}  # fmt: skip
    growth.look()
    databases = {name: one.strategy for name, one in db.databases.items()}
    worker_pool = db.strategy.worker_pool
    return {
        "error": None,
        "worker_pool": worker_pool.name,
        "concurrency": worker_pool.concurrency,
        "databases": {
            name: {"strategy": strategy.name, "max_connections": strategy.max_connections}
            for name, strategy in databases.items()
        },
        "processes": processes.reports(),
        "outbox": outbox.in_short(db),
    }


@control_command()
def recycle_connections(state: Any, **_: Any) -> Any:
    """Close all connections: idle ones now, the others when they come back; the next statement connects anew."""
    if apps.find(state.app) is None:
        return {"error": NO_ALCHEMY}
    processes.recycle()
    return {"ok": "idle connections are closed, the others when they come back"}
