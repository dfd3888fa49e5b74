"""`db.dispose()`, `db.stop()` and the end of a worker close what coroutines have opened, wherever they ran."""

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import event, make_url, text
from support.async_shop import Shop
from support.waiting import eventually

from celery_alchemy.strategies.asynchronous import loop_thread
from celery_alchemy.workers.starting import signals
from celery_alchemy.workers.watching import processes

End = Callable[[Shop], object]
ONE = text("SELECT 1")


class Counted:
    """The connections of a Shop that are open."""

    def __init__(self, shop: Shop) -> None:
        self.opened = self.closed = 0

        @shop.db.on_engine
        def listen(engine: Any) -> None:
            event.listen(engine, "connect", self._connected)
            event.listen(engine, "close", self._gone)

    def _connected(self, *_: object) -> None:
        self.opened += 1

    def _gone(self, *_: object) -> None:
        self.closed += 1

    def none_is_left(self) -> bool:
        return self.opened == self.closed


@pytest.fixture
def counted(shop: Shop) -> Counted:
    return Counted(shop)


async def use(shop: Shop) -> None:
    async with shop.db.async_unit_of_work() as session:
        await session.scalar(ONE)
    async with shop.db.async_unit_of_work(read_only=True) as session:
        await session.scalar(ONE)


async def body_that_uses(task: Any) -> None:
    await task.db.scalar(ONE)


@pytest.fixture(params=["asked for by ordinary code first", "by coroutines alone"])
def asked(request: pytest.FixtureRequest, shop: Shop) -> None:
    if request.param.startswith("asked"):
        shop.task(body_that_uses)  # an app without any is told that its driver is no ordinary one
        _ = shop.db.strategy


@pytest.mark.parametrize("end", [lambda shop: shop.db.dispose(), lambda shop: shop.db.stop()])
def test_a_coroutine_that_a_task_has_started_disposes(asked: None, shop: Shop, counted: Counted, end: End) -> None:
    """It waited for its own event loop, and so for ever."""

    async def child() -> None:
        await use(shop)
        end(shop)
        for _ in range(500):
            if counted.closed >= 2:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it was not closed")

    async def body(task: Any) -> None:
        await asyncio.gather(child())

    running = threading.Thread(target=shop.run, args=(body,), daemon=True)
    running.start()
    running.join(20)
    assert not running.is_alive()
    assert counted.opened >= 2


@pytest.mark.parametrize("end", [lambda shop: shop.db.dispose(), lambda shop: shop.db.stop()])
def test_the_event_loops_of_all_threads_are_reached(asked: None, shop: Shop, counted: Counted, end: End) -> None:
    loops = [asyncio.new_event_loop() for _ in range(2)]
    threads = [threading.Thread(target=loop.run_forever) for loop in loops]
    for thread, loop in zip(threads, loops, strict=True):
        thread.start()
        asyncio.run_coroutine_threadsafe(use(shop), loop).result(20)
    shop.run(body_that_uses)
    opened = counted.opened
    end(shop)
    try:
        assert (opened, counted.closed) == (5, 5)
    finally:
        for thread, loop in zip(threads, loops, strict=True):
            loop.call_soon_threadsafe(loop.stop)
            thread.join(20)
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_the_last_line_of_a_coroutine_disposes(
    shop: Shop, counted: Counted, turns: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What it has begun was cut short by the end of `asyncio.run()`: an error with a traceback in the log."""

    async def main() -> None:
        await use(shop)
        shop.db.dispose()
        for _ in range(turns):
            await asyncio.sleep(0)

    asyncio.run(main())
    assert (counted.opened, counted.closed) == (2, 2)
    assert "Exception closing connection" not in caplog.text


def test_an_event_loop_that_pauses_disposes_when_it_goes_on(shop: Shop, counted: Counted) -> None:
    """That of a test: it runs for the test alone, not for what cleans up after it."""
    with asyncio.Runner() as runner:
        runner.run(use(shop))
        shop.db.dispose()
        assert counted.closed == 0
        runner.run(asyncio.sleep(0.2))
        assert counted.closed == 2


def test_an_engine_that_is_kept_is_closed_at_the_end_too(shop: Shop, counted: Counted) -> None:
    async def main() -> None:
        engine = shop.db.async_engine
        await use(shop)
        shop.db.stop()
        await asyncio.sleep(0.2)
        gc.collect()
        await asyncio.sleep(0.2)
        async with engine.connect() as connection:
            await connection.execute(ONE)

    asyncio.run(main())
    assert counted.opened == 3
    assert counted.none_is_left()


@pytest.fixture
def other(shop: Shop) -> Iterator[Shop]:
    found = Shop(make_url(shop.app.conf.alchemy_database_url).render_as_string(hide_password=False))
    yield found
    found.db.stop()
    found.app.close()


def test_the_end_of_one_worker_leaves_nothing_of_another_app(shop: Shop, other: Shop, counted: Counted) -> None:
    """They share the event loop of the process, which ends."""
    others = Counted(other)
    shop.run(body_that_uses)
    other.run(body_that_uses)
    signals.stop(shop.app)
    assert (others.opened, others.closed) == (1, 1)
    other.run(body_that_uses)
    signals.stop(other.app)
    assert (others.opened, others.closed, counted.none_is_left()) == (2, 2, True)


def test_another_app_takes_over(shop: Shop, other: Shop, counted: Counted) -> None:
    shop.run(body_that_uses)
    other.db.stop()
    signals.apps.unregister(other.app, other.db)
    shop.db.init_app(other.app)
    assert counted.none_is_left()
    other.db = shop.db
    other.run(body_that_uses)
    shop.db.stop()
    assert counted.opened == 2
    assert counted.none_is_left()


def test_what_runs_on_when_the_event_loop_of_the_process_ends_gives_back_its_connection(
    shop: Shop, counted: Counted
) -> None:
    async def forever() -> None:
        async with shop.db.async_unit_of_work() as session:
            await session.scalar(ONE)
            await asyncio.sleep(1000)

    kept: list[Any] = []

    async def body(task: Any) -> None:
        kept.append(asyncio.create_task(forever()))
        await asyncio.sleep(0.2)

    shop.run(body)
    assert counted.opened == 1
    loop_thread.stop()
    eventually(counted.none_is_left, "it is closed")


def test_a_listener_that_comes_late_hears_of_the_engines_of_coroutines(asked: None, shop: Shop) -> None:
    seen: list[Any] = []

    async def main() -> None:
        engine = shop.db.async_engine.sync_engine
        shop.db.on_engine(seen.append)
        assert engine in seen

    asyncio.run(main())
    asyncio.run(use(shop))
    assert len(seen) in {3, 4}  # one may be that of ordinary code


def test_recycling_reaches_the_connections_of_coroutines(asked: None, shop: Shop, counted: Counted) -> None:
    """The command of `celery control`; it logged that nothing can be awaited there, or left them out."""
    shop.run(body_that_uses)
    processes.recycle()
    assert (counted.opened, counted.closed) == (1, 1)
    shop.run(body_that_uses)
    assert counted.opened == 2
