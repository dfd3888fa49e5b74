"""The same tasks as `async def`, on an event loop: each row by hand, and with the layer, under `per_loop`.

By hand is the floor: an AsyncSession in a task that Celery's tracer runs in one greenlet of the loop. What an awaited
driver costs more than the one of threads is in both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import cached_property, partial
from typing import Any

from celery import Celery
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.util import await_only, greenlet_spawn

from ... import Alchemy, AsyncDatabaseTask
from ...workers.asyncio_pool.job import Job
from ...workers.asyncio_pool.reports import Report
from ...workers.asyncio_pool.tasks import prepare

LIMIT_S = 600.0
Run = Callable[[], object]


def by_hand(app: Celery, url: str) -> tuple[Run, list[Any]]:
    """Add the tasks to `app`; return what closes their Engine, and them."""
    engine = create_async_engine(url, pool_size=1, max_overflow=1)
    task = partial(app.task, shared=False)

    @task
    def nothing() -> None:
        pass

    @task
    def select() -> None:
        async def body() -> None:
            async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
                await session.execute(text("SELECT 1"))

        await_only(body())

    return engine.sync_engine.dispose, [nothing, select]


def with_layer(app: Celery, url: str) -> tuple[Run, list[Any]]:
    """Add the tasks to `app`; return what closes the Engine of its Alchemy, and them."""
    db = Alchemy(app)
    unbound = partial(app.task, shared=False, base=AsyncDatabaseTask)

    @unbound
    async def nothing() -> None:
        pass

    @unbound(bind=True)
    async def select(self: AsyncDatabaseTask) -> None:
        await self.db.execute(text("SELECT 1"))

    return db.stop, [nothing, select]


class _Pool:
    """What a job needs of its worker pool, with no consumer."""

    acknowledges_elsewhere = True

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The one that runs."""
        return asyncio.get_running_loop()

    def ended(self, job: Job) -> None:
        """Its slot is free."""


def on_loop(task: Any, run: Run, hosts: bool) -> Run:
    """Return a call that runs a task as the worker pool asyncio does, and waits in its own greenlet.

    Args:
        hosts: As a job of ours; False: in one greenlet, and nothing else.
    """
    if not hosts:
        return lambda: await_only(asyncio.get_running_loop().create_task(_spawned(run)))
    pool, name = _Pool(), task.name
    way = prepare(task.app.tasks[name])

    def job() -> None:
        one = Job(pool, way, lambda: (0, run(), 0.0), Report(None, None, None, None), name, (None, None))  # type: ignore[arg-type]
        one.start()
        assert one.task is not None
        await_only(one.task)

    return job


async def _spawned(run: Run) -> object:
    return await greenlet_spawn(run)


def in_a_greenlet(function: Run) -> None:
    """Call `function` in a greenlet on an event loop, and end with it."""
    answered: Coroutine[Any, Any, object] = _spawned(function)
    asyncio.run(answered)
