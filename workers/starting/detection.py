"""Which worker pool runs: read off the worker itself. `app.conf.worker_pool` says prefork under `--pool=gevent`."""

from __future__ import annotations

import json
import os
from typing import Any

from celery.concurrency import get_implementation

from ...strategies.worker_pool import WorkerPool

#: Hands what the main process found to spawned pool processes, which inherit nothing but the environment.
ENVIRONMENT = "CELERY_ALCHEMY_WORKER_POOL"

#: The defining module of each of Celery's pools, and of ours; a custom pool is known by the one it is built on.
_MODULES = {
    "celery.concurrency.prefork": "prefork",
    "celery.concurrency.thread": "threads",
    "celery.concurrency.gevent": "gevent",
    "celery.concurrency.eventlet": "eventlet",
    "celery.concurrency.solo": "solo",
    "celery_alchemy.workers.asyncio_pool.pool": "asyncio",
}
POOLS: tuple[str, ...] = tuple(_MODULES.values())


def detect(worker: Any) -> WorkerPool:
    """Return what is known of the worker pool of `worker`, a WorkController whose Pool bootstep is created."""
    pool_class = get_implementation(worker.pool_cls)
    # Autoscale's upper end is nowhere but here; `concurrency` may be the number of processors then.
    concurrency = worker.max_concurrency or worker.concurrency
    name = name_of(pool_class)
    return WorkerPool(
        name=name,
        implementation=f"{pool_class.__module__}:{pool_class.__qualname__}",
        concurrency=1 if name == "solo" else max(int(concurrency), 1),
        start_method=_start_method(worker) if name == "prefork" else "fork",
    )


def name_of(pool_class: type) -> str:
    """Return the name of the worker pool that `pool_class` is, or is built on; `custom` when it is none of Celery's."""
    for base in pool_class.__mro__:
        name = _MODULES.get(base.__module__)
        if name is not None and base.__name__ == "TaskPool":
            return name
    return "custom"


def _start_method(worker: Any) -> str:
    if getattr(worker, "pool_start_method", None) == "spawn":
        return "spawn"
    try:
        from billiard import get_start_method
    except ImportError:
        return "fork"
    return "fork" if get_start_method(allow_none=True) in {None, "fork"} else "spawn"


def publish(pool: WorkerPool, strategies: dict[str, str], asks_at: str | None) -> None:
    """Leave word for pool processes that start as fresh interpreters.

    Args:
        strategies: Of each database, its class.
        asks_at: Where they are asked what they are doing.
    """
    os.environ[ENVIRONMENT] = json.dumps(
        {
            "name": pool.name,
            "implementation": pool.implementation,
            "concurrency": pool.concurrency,
            "start_method": pool.start_method,
            "main_pid": pool.main_pid,
            "strategies": strategies,
            "asks_at": asks_at,
        }
    )


def withdraw() -> None:
    """Take back the word: the worker is over, and other programs may be started from here."""
    os.environ.pop(ENVIRONMENT, None)


def published() -> tuple[WorkerPool, dict[str, str], str | None] | None:
    """Return what the main process left for this spawned pool process, as it was given to `publish`."""
    text = os.environ.get(ENVIRONMENT)
    if not text:
        return None
    values = json.loads(text)
    strategies, asks_at = values.pop("strategies"), values.pop("asks_at")
    return WorkerPool(**values), strategies, asks_at
