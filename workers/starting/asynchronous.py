"""What an app's `async def` tasks need of the worker that starts, and what is said of them."""

from __future__ import annotations

import logging
import os

from celery import Celery

from ...strategies.asynchronous.strategy import PerLoopStrategy
from ...strategies.names import counted
from ...strategies.worker_pool import WorkerPool
from ..databases import Databases
from ..errors import ConfigurationError
from ..wrapping import async_tasks, is_database_task

logger: logging.Logger = logging.getLogger(__name__)


def start(app: Celery, databases: Databases, worker_pool: WorkerPool) -> list[str]:
    """Choose and prepare the strategy of the `async def` tasks of `app`; nothing for an app that has none.

    Returns:
        Lines for the log.
    Raises:
        ConfigurationError: the worker pool cannot run them, and there are no others; or the driver cannot be awaited.
    """
    names = async_tasks(app)
    if not names:
        return []
    own = [name for name in app.tasks if not name.startswith("celery.")]
    ordinary = [name for name in own if is_database_task(app.tasks[name]) and name not in names]
    shown = ", ".join(sorted(names)[:3])
    refusal = PerLoopStrategy.refuses(worker_pool)
    if refusal is not None:
        text = f"{counted(len(names), '`async def` task')} ({shown}) in this app, and worker pool {worker_pool.name}"
        if len(names) == len(own):
            raise ConfigurationError(f"{text}: {refusal}.")
        logger.warning("%s: %s. Here they are refused; the other tasks run.", text, refusal)
        return []
    lines = []
    reads = any(app.tasks[name].read_only is True for name in names)
    for name, db in databases.items():
        alone = isinstance(db.strategy, PerLoopStrategy)
        strategy = db.strategy if alone else db.coroutines.start(worker_pool)
        strategy.reads_apart = reads
        if alone and ordinary and worker_pool.name != "asyncio":
            raise ConfigurationError(
                f"{counted(len(ordinary), 'DatabaseTask')} ({', '.join(sorted(ordinary)[:3])}) in this app, whose "
                f"database driver can only be awaited. Write postgresql+psycopg, which serves both kinds of task, or "
                f"make them `async def` functions with base=AsyncDatabaseTask."
            )
        which = f"database {name!r}: " if len(databases) > 1 else ""
        loop = "the event loop of the worker pool" if worker_pool.name == "asyncio" else "one event loop per process"
        lines.append(
            f"celery-alchemy in pid {os.getpid()}: {counted(len(names), '`async def` task')} on {loop}"
            # Where there is no other strategy, the worker's own line describes it.
            f"{'' if alone else f'; {which}{strategy.describe()}'}"
        )
    return lines
