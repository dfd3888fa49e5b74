"""A coroutine that is cancelled in a statement: the server stops it, the connection is discarded, its place is free."""

import asyncio
import random

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from support.async_drivers import Server
from support.waiting import eventually

from celery_alchemy.strategies.engines.sizing import PoolSize

CANCELLATIONS = 20


async def in_statement(engine: AsyncEngine, statement: str, begun: asyncio.Event) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(text("SELECT 1"))
        begun.set()
        await session.execute(text(statement))


def test_the_statement_is_gone_and_the_place_is_free(server: Server) -> None:
    async def body(engine: AsyncEngine) -> None:
        for _ in range(CANCELLATIONS):
            begun = asyncio.Event()
            task = asyncio.create_task(in_statement(engine, server.slow, begun))
            await begun.wait()
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            await asyncio.to_thread(eventually, lambda: not server.busy(), "nothing runs on the server", within_s=5)
        async with AsyncSession(engine) as session:
            assert (await session.execute(text("SELECT 1"))).scalar_one() == 1

    server.run(body, PoolSize(1))
    assert server.connects >= CANCELLATIONS, "the connections were to be discarded"
    assert len(server.errors) == CANCELLATIONS


def test_many_at_once(server: Server) -> None:
    """At moments that differ, some before the statement has reached the server."""

    async def body(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(in_statement(engine, server.slow, asyncio.Event())) for _ in range(60)]
        loop = asyncio.get_running_loop()
        for task in tasks:
            loop.call_later(random.random(), task.cancel)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in ended)

    server.run(body, PoolSize(5))
    eventually(lambda: not server.busy(), "nothing runs on the server", within_s=5)
    assert server.connects >= 5
