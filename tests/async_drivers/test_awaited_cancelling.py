"""A coroutine that is cancelled in a statement: the server stops it, the connection is discarded, its place is free."""

import asyncio
import contextlib
import contextvars
import random
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.util import await_only
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
            await asyncio.wait([task, asyncio.ensure_future(begun.wait())], return_when=asyncio.FIRST_COMPLETED)
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
        while server.connects < 5:  # on a busy machine all could be cancelled before the first is connected
            await asyncio.sleep(0.01)
        for task in tasks:
            loop.call_later(random.random(), task.cancel)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in ended)

    server.run(body, PoolSize(5))
    eventually(lambda: not server.busy(), "nothing runs on the server", within_s=5)
    assert server.connects >= 5


def test_who_waits_for_a_lock_lets_go_before_it_is_free(server: Server, key: str) -> None:
    """SQLite does not hear an interruption while it waits, for up to ten seconds."""
    insert = text("INSERT INTO users (name) VALUES (:name)")

    async def body(engine: AsyncEngine) -> None:
        async def wait_for_lock() -> None:
            async with AsyncSession(engine) as session:
                await session.execute(insert, {"name": key})

        async with AsyncSession(engine) as holder:
            await holder.execute(insert, {"name": key})
            for _ in range(3):
                task = asyncio.get_running_loop().create_task(wait_for_lock(), context=contextvars.Context())
                await asyncio.sleep(0.2)
                task.cancel()
                done, _ = await asyncio.wait([task], timeout=6)
                assert done, "it still waits"
                assert task.cancelled()
                assert engine.pool.checkedout() == 1  # type: ignore[attr-defined]
            await holder.commit()
        await asyncio.sleep(0.1)
        async with AsyncSession(engine) as session:
            assert (await session.execute(text("SELECT count(*) FROM users WHERE name = :n"), {"n": key})).scalar() == 1

    server.serves_tasks = True
    server.run(body, PoolSize(2))


def test_a_cancelled_commit_leaves_no_connection_in_a_transaction(server: Server, key: str) -> None:
    """What became of it is known when the server is asked; half of it is never there."""

    async def body(engine: AsyncEngine) -> None:
        async def one(number: int) -> None:
            async with AsyncSession(engine) as session:
                for part in ("a", "b"):
                    values = {"key": f"{key}{number}", "note": part}
                    await session.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, :note)"), values)
                task = asyncio.create_task(session.commit())
                await asyncio.sleep(0)
                asyncio.get_running_loop().call_later(random.random() * 0.002, task.cancel)
                await asyncio.wait([task])

        for number in range(CANCELLATIONS):
            await one(number)

    server.run(body, PoolSize(1))
    assert not server.busy()
    for number in range(CANCELLATIONS):
        assert server.database.rows(f"{key}{number}") in ([], ["a", "b"])


def test_a_cancellation_that_the_driver_has_swallowed_is_raised(server: Server) -> None:
    """`asyncio.wait_for` of Python 3.11 does so now and then, and two of the drivers connect with it."""

    async def swallow(begun: asyncio.Event) -> None:
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(30)

    async def body(engine: AsyncEngine) -> None:
        for _ in range(CANCELLATIONS):
            begun = asyncio.Event()

            def connect(dialect: Any, record: object, args: Any, options: Any, begun: asyncio.Event = begun) -> Any:
                made = dialect.connect(*args, **options)
                await_only(swallow(begun))
                return made

            event.listen(engine.sync_engine, "do_connect", connect)
            task = asyncio.create_task(in_statement(engine, server.slow, asyncio.Event()))
            await begun.wait()
            task.cancel()
            await asyncio.wait([task], timeout=10)
            assert task.cancelled()
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            event.remove(engine.sync_engine, "do_connect", connect)

    server.run(body, PoolSize(1))
