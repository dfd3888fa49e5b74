"""What is left when an event loop has ended, and when connections are disposed: nothing."""

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from support.async_drivers import Server
from support.waiting import eventually

from celery_alchemy.strategies.engines import closing_tasks
from celery_alchemy.strategies.engines.awaited_engines import AwaitedEngines
from celery_alchemy.strategies.engines.sizing import PoolSize

ONE = text("SELECT 1")
SIZE = PoolSize(2, reserve=1)


def run_by_hand(main: Coroutine[Any, Any, None]) -> None:
    """Run `main`, and end its event loop as code does that knows of no asynchronous generators."""
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(main)
    finally:
        loop.close()


@pytest.fixture
def engines(server: Server) -> AwaitedEngines:
    return AwaitedEngines(server.factory(SIZE, {}), lambda: SIZE)


@pytest.fixture
def open_now(server: Server) -> Callable[[], int]:
    """How many connections there are: on the server, or threads of aiosqlite, which has one for each."""
    before = set(threading.enumerate())
    if server.is_sqlite:
        return lambda: len(set(threading.enumerate()) - before)
    return lambda: len(server.database.connections(server.name))


async def select(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        assert (await connection.execute(ONE)).scalar_one() == 1


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("run", [asyncio.run, run_by_hand])
def test_no_connection_and_no_engine_of_a_loop_that_has_ended_is_left(
    engines: AwaitedEngines, open_now: Callable[[], int], run: Callable[[Any], None]
) -> None:
    """A web request or a task that calls asyncio.run() each time used up all connections of the server."""
    made: list[weakref.ref[Any]] = []

    async def main() -> None:
        await select(engines.engine)
        await select(engines.reader)
        made.extend(map(weakref.ref, (engines.engine.sync_engine, engines.reader.sync_engine)))

    for _ in range(3):
        run(main())
    assert len(made) == 6
    assert engines.made() == []
    eventually(lambda: open_now() == 0, "no connection is left")
    for _ in range(3):  # what is finalized may be collected in the next round only
        gc.collect()
    assert sum(one() is not None for one in made) <= 2, "more than those of the last event loop"


def test_a_generator_that_is_left_open_gives_back_what_it_has(
    engines: AwaitedEngines, open_now: Callable[[], int]
) -> None:
    async def rows() -> AsyncIterator[int]:
        async with engines.engine.connect() as connection:
            yield (await connection.execute(ONE)).scalar_one()

    async def main() -> None:
        kept.append(rows())
        assert await anext(kept[0]) == 1

    kept: list[Any] = []
    asyncio.run(main())
    eventually(lambda: open_now() == 0, "no connection is left")


def test_what_is_in_use_when_it_is_disposed_is_closed_when_it_comes_back(
    engines: AwaitedEngines, open_now: Callable[[], int]
) -> None:
    async def main() -> None:
        async with engines.engine.connect() as connection, engines.engine.connect() as nested:
            await connection.execute(ONE)
            await nested.execute(ONE)
            await engines.dispose()
            assert (await connection.execute(ONE)).scalar_one() == 1
        for _ in range(500):
            if open_now() == 0:
                break
            await asyncio.sleep(0.02)
        assert open_now() == 0
        await select(engines.engine)

    asyncio.run(main())


def test_who_waits_when_it_is_disposed_gets_a_connection(server: Server) -> None:
    one = PoolSize(1)
    engines = AwaitedEngines(server.factory(one, {"pool_timeout": 20}), lambda: one)

    async def hold(engine: AsyncEngine, has_one: asyncio.Event) -> None:
        async with engine.connect() as connection:
            await connection.execute(ONE)
            has_one.set()
            await asyncio.sleep(0.1)
            await engines.dispose()

    async def wait(engine: AsyncEngine, has_one: asyncio.Event) -> None:
        await has_one.wait()
        await select(engine)

    async def main() -> None:
        has_one = asyncio.Event()
        both = (hold(engines.engine, has_one), wait(engines.engine, has_one))
        await asyncio.wait_for(asyncio.gather(*both), 15)

    asyncio.run(main())


def test_a_listener_that_raises_runs_again_for_the_engine_that_reads(server: Server) -> None:
    seen: list[Any] = []

    def listener(engine: Any) -> None:
        seen.append(engine)
        if len(seen) == 2:
            raise LookupError

    server.listeners.append(listener)
    engines = AwaitedEngines(server.factory(SIZE, {}), lambda: SIZE)

    async def main() -> None:
        with contextlib.suppress(LookupError):
            _ = engines.reader
        assert engines.reader.sync_engine is seen[-1]
        assert len(seen) == 3

    asyncio.run(main())


def test_what_closes_is_not_cut_short_by_the_end_of_the_event_loop(
    server: Server, open_now: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    """`asyncio.run()` cancels all tasks; each connection of the overflow was an error with a traceback in the log."""
    one = PoolSize(1, max_overflow=3)
    engines = AwaitedEngines(server.factory(one, {}), lambda: one)

    async def hold(engine: AsyncEngine, all_hold: asyncio.Barrier) -> None:
        async with engine.connect() as connection:
            await connection.execute(ONE)
            await all_hold.wait()

    async def main() -> None:
        all_hold = asyncio.Barrier(4)
        await asyncio.gather(*(hold(engines.engine, all_hold) for _ in range(4)))

    asyncio.run(main())
    eventually(lambda: open_now() == 0, "no connection is left")
    assert "Exception closing connection" not in caplog.text


def test_the_end_of_an_event_loop_waits_for_no_goodbye_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing_tasks, "CUT_S", 0.05)
    closing: list[closing_tasks.ClosingTask] = []

    async def main() -> None:
        hangs: Any = asyncio.Event().wait()
        closing.append(closing_tasks.ClosingTask(hangs, loop=asyncio.get_running_loop()))
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), 10))
    assert closing[0].cancelled()
    assert not closing[0].cancel()
