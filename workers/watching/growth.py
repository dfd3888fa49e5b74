"""A worker pool that grows, by `celery control pool_grow` or `autoscale`: under prefork each process that comes opens
connections that were not announced at worker start."""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

from .. import apps
from .._celery import concurrency_now

logger: logging.Logger = logging.getLogger(__name__)


def watch(db: Any, worker: Any) -> None:
    """`worker` serves the app of `db`, and has announced its connections."""
    db.worker = weakref.ref(worker)


def look() -> None:
    """Announce anew what has changed since; called before a pool process is made, and when somebody asks."""
    for db in apps.every():
        worker = db.worker() if db.worker is not None else None
        if worker is not None:
            _look_at(db, worker)


def _look_at(db: Any, worker: Any) -> None:
    if not (db.strategy.worker_pool.forks or db.strategy.worker_pool.takes_turns):
        return
    now, before = concurrency_now(worker), db.strategy.worker_pool
    if not now or now == before.concurrency or os.getpid() != before.main_pid:
        return
    for name, one in db.databases.items():
        strategy = one.strategy
        announced = strategy.max_connections
        strategy.worker_pool = strategy.worker_pool.resized(now)
        grown = announced is not None and (strategy.max_connections or 0) > announced
        which = f"database {name!r}: " if len(db.databases) > 1 else ""
        logger.log(
            logging.WARNING if grown else logging.INFO,
            "celery-alchemy in pid %s: worker pool %s, concurrency %s instead of %s; %s%s (announced before: %s)",
            os.getpid(), before.name, now, before.concurrency, which, strategy.describe_limit(),
            "no limit" if announced is None else announced,
        )  # fmt: skip
