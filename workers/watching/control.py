"""`celery inspect sessions` and `celery control recycle_connections`: what the workers are doing, and a fresh start."""

from __future__ import annotations

import os
from typing import Any

from celery.worker.control import control_command, inspect_command
from sqlalchemy.pool import QueuePool

from ...strategies import SessionStrategy
from ...strategies.watching import board
from ...strategies.watching.activity import activities
from .. import apps
from . import boards


@inspect_command(default_timeout=2.0)
def sessions(state: Any, **_: Any) -> Any:
    """Units of work that are open, connections, leaks, for each process."""
    db = apps.find(state.app)
    if db is None:
        return {"error": "the app of this worker has no Alchemy"}
    databases = {name: one.strategy for name, one in db.databases.items()}
    worker_pool = db.strategy.worker_pool
    folder = boards.folder()
    if folder is not None:
        processes = board.read(folder)
    else:
        here = {"pid": os.getpid(), **activities.report()}
        here["connections"] = {name: _connections(strategy) for name, strategy in databases.items()}
        processes = [here]
    return {
        "worker_pool": worker_pool.name,
        "concurrency": worker_pool.concurrency,
        "databases": {
            name: {"strategy": strategy.name, "max_connections": strategy.max_connections}
            for name, strategy in databases.items()
        },
        "processes": processes,
    }


@control_command()
def recycle_connections(state: Any, **_: Any) -> Any:
    """Close all connections: idle ones now, the others when they come back; the next statement connects anew."""
    db = apps.find(state.app)
    if db is None:
        return {"error": "the app of this worker has no Alchemy"}
    folder = boards.folder()
    if folder is not None:
        board.order_recycling(folder)
        return {"ok": "each pool process closes its connections when it begins its next task"}
    boards.recycle_all()
    return {"ok": "idle connections are closed, the others when they come back"}


def _connections(strategy: SessionStrategy) -> dict[str, Any]:
    pools = [engine.pool for engine in strategy.engines_made() if isinstance(engine.pool, QueuePool)]
    out = sum(pool.checkedout() for pool in pools)
    return {"open": out + sum(_idle(pool) for pool in pools), "checked out": out}


def _idle(pool: QueuePool) -> int:
    return sum(1 for record in list(getattr(pool._pool, "queue", ())) if record.dbapi_connection is not None)
