"""The connection pool on an event loop: sizes, reserve, order and messages are those of the other worker pools."""

import asyncio
import random
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from support.async_drivers import Server, backend, settled

from celery_alchemy import TransientDatabaseError
from celery_alchemy.strategies.engines.sizing import PoolSize
from celery_alchemy.strategies.errors import NoConnectionFree, ReservedSlotsInUse

#: Checkouts of the fuzz, for each driver.
CHECKOUTS = 2000
ONE = text("SELECT 1")


async def hold(engine: AsyncEngine, until: asyncio.Event) -> None:
    async with engine.connect() as connection:
        await connection.execute(ONE)
        await until.wait()


async def holders(engine: AsyncEngine, count: int, until: asyncio.Event) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(hold(engine, until)) for _ in range(count)]
    pool: Any = engine.pool
    while pool.checkedout() < count:
        await asyncio.sleep(0.01)
    return tasks


def test_no_more_connections_than_its_size(server: Server) -> None:
    most = 0

    async def body(engine: AsyncEngine) -> None:
        async def one() -> None:
            nonlocal most
            async with engine.connect() as connection:
                await connection.execute(ONE)
                most = max(most, engine.pool.checkedout())  # type: ignore[attr-defined]

        await asyncio.gather(*(one() for _ in range(200)))
        assert engine.pool.checkedin() <= 2  # type: ignore[attr-defined]

    server.run(body, PoolSize(2, max_overflow=1))
    assert most == 3


def test_who_waits_longest_is_first(server: Server) -> None:
    order: list[int] = []

    async def body(engine: AsyncEngine) -> None:
        async def one(number: int) -> None:
            async with engine.connect() as connection:
                order.append(number)
                await connection.execute(ONE)

        done = asyncio.Event()
        await holders(engine, 1, done)
        tasks = []
        for number in range(50):
            tasks.append(asyncio.create_task(one(number)))
            await asyncio.sleep(0)
        tasks[7].cancel()
        done.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    server.run(body, PoolSize(1))
    assert order == [number for number in range(50) if number != 7]


def test_a_timeout_says_so(server: Server) -> None:
    async def body(engine: AsyncEngine) -> None:
        done = asyncio.Event()
        tasks = await holders(engine, 1, done)
        with pytest.raises(NoConnectionFree, match="timed out") as caught:
            await hold(engine, done)
        assert isinstance(caught.value, TransientDatabaseError)
        done.set()
        await asyncio.gather(*tasks)

    server.run(body, PoolSize(1, reserve=0), pool_timeout=0.2)


def test_nested_in_one_coroutine_is_refused_at_once(server: Server) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with engine.connect() as outer:
            await outer.execute(ONE)
            async with engine.connect() as reserved:
                await reserved.execute(ONE)
                with pytest.raises(ReservedSlotsInUse, match="already holds a connection"):
                    await hold(engine, asyncio.Event())

    server.run(body, PoolSize(1, reserve=1))


def test_a_child_of_one_that_holds_a_connection_is_nested(server: Server) -> None:
    async def body(engine: AsyncEngine) -> None:
        done = asyncio.Event()
        done.set()
        async with engine.connect() as outer:
            await outer.execute(ONE)
            with pytest.raises(ReservedSlotsInUse):
                await asyncio.create_task(hold(engine, done))
            with pytest.raises(ReservedSlotsInUse):
                await asyncio.gather(asyncio.gather(hold(engine, done)))
        await asyncio.create_task(hold(engine, done))

    server.run(body, PoolSize(1))


@pytest.mark.parametrize("reserve", [0, 2])
def test_200_nested_on_two_connections_end_or_are_refused(server: Server, reserve: int) -> None:
    async def body(engine: AsyncEngine) -> list[Any]:
        engine.pool.waits_in_line = lambda scope, connections: True  # type: ignore[attr-defined] - as tasks do

        async def one() -> str:
            async with AsyncSession(engine) as outer:
                await outer.execute(ONE)
                await asyncio.sleep(0.001)
                async with AsyncSession(engine) as inner:
                    await inner.execute(ONE)
            return "ended"

        return await asyncio.gather(*(one() for _ in range(200)), return_exceptions=True)

    ended: list[Any] = server.run(body, PoolSize(2, reserve=reserve), within_s=30)
    refused = [one for one in ended if isinstance(one, ReservedSlotsInUse)]
    assert ended.count("ended") + len(refused) == 200
    assert (ended.count("ended") == 200) is (reserve == 2)


def test_a_connection_that_cannot_be_made_frees_its_place(server: Server) -> None:
    """In SQLAlchemy's own connection pool who waits behind it waits until the timeout."""

    async def body(engine: AsyncEngine) -> None:
        first = asyncio.create_task(hold(engine, asyncio.Event()))
        await asyncio.sleep(0)  # it is connecting now
        done = asyncio.Event()
        done.set()
        second = asyncio.create_task(hold(engine, done))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait_for(second, 10)

    server.run(body, PoolSize(1))


def test_fuzz(server: Server) -> None:
    """Cancelled at any moment of checkout, statement, COMMIT, ROLLBACK and return: no place is lost, no connection is
    left, nobody waits for ever."""
    cancelled = ended = 0

    async def body(engine: AsyncEngine) -> None:
        nonlocal cancelled, ended
        chance = random.Random(17)

        async def one(kind: int) -> None:
            async with AsyncSession(engine) as session:
                await session.execute(ONE)
                if kind == 1:
                    async with AsyncSession(engine) as nested:
                        await nested.execute(ONE)
                if kind == 2:
                    await session.rollback()
                elif kind == 3:
                    return
                await session.commit()

        for _ in range(CHECKOUTS // 50):
            tasks = [asyncio.create_task(one(chance.randrange(4))) for _ in range(50)]
            for task in tasks:
                if chance.random() < 0.5:
                    asyncio.get_running_loop().call_later(chance.random() * 0.05, task.cancel)
            for found in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(found, asyncio.CancelledError):
                    cancelled += 1
                elif not isinstance(found, ReservedSlotsInUse):
                    assert found is None, found
                    ended += 1
        await settled(engine)
        done = asyncio.Event()
        tasks = await holders(engine, 3, done)
        done.set()
        await asyncio.gather(*tasks)

    server.run(body, PoolSize(3, reserve=2), within_s=100)
    print(f"{server.driver}: {CHECKOUTS} checkouts, {ended} ended, {cancelled} cancelled, {server.connects} connects")
    assert ended > CHECKOUTS // 10
    assert cancelled > CHECKOUTS // 20
    assert not server.busy()
    assert not [noise["message"] for noise in server.noises]


def test_backends_are_kept(server: Server) -> None:
    if server.is_sqlite:
        return

    async def body(engine: AsyncEngine) -> set[int]:
        pids = set()
        for _ in range(20):
            async with engine.connect() as connection:
                pids.add(await backend(connection))
        return pids

    assert len(server.run(body, PoolSize(1))) == 1
