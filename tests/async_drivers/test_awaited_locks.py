"""A coroutine that is cancelled where its connection is in the middle of something: locks are free, and places."""

import asyncio
import contextlib
import gc
import threading
import time
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.util import greenlet_spawn
from support.async_drivers import Server, settled, struck

from celery_alchemy.strategies.engines.sizing import PoolSize

INSERT = text("INSERT INTO counters (key_, value) VALUES (:key, 0)")
UPDATE = text("UPDATE counters SET value = value + 1 WHERE key_ = :key")
#: Several rows, so that the first one is not the end of the answer.
ROWS = text("SELECT 1 AS number UNION ALL SELECT 2 UNION ALL SELECT 3")


def cancel_when_executed(engine: AsyncEngine, task: "asyncio.Task[Any]") -> None:
    """Cancel `task` when `ROWS` has been executed, and before it knows that."""

    def strike(driver_connection: Any) -> None:
        if hasattr(driver_connection, "_tx"):  # aiosqlite: what its thread is to do, in that order
            executed = threading.Event()
            driver_connection._tx.put_nowait((None, executed.set))
            assert executed.wait(30)
        else:
            time.sleep(0.05)  # the answer is there, and nobody has read it
        task.cancel()

    @event.listens_for(engine.sync_engine, "before_cursor_execute", once=True)
    def before(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        assert statement == ROWS.text
        asyncio.get_running_loop().call_soon(strike, connection.connection.driver_connection)


@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")  # psycopg's cursor of a stream
@pytest.mark.parametrize("streams", [False, True], ids=["execute", "stream"])
def test_its_locks_are_free_while_the_error_is_kept(server: Server, key: str, streams: bool) -> None:
    """SQLite refuses a ROLLBACK while a statement that was interrupted is open, and a connection that is closed keeps
    its locks until the last cursor of it is collected."""

    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await session.execute(INSERT, {"key": key})
            await session.commit()
        begun = asyncio.Event()

        async def write_and_read() -> None:
            async with AsyncSession(engine) as session:
                await session.execute(UPDATE, {"key": key})
                begun.set()
                await asyncio.sleep(0)
                await (session.stream(ROWS) if streams else session.execute(ROWS))

        task = asyncio.create_task(write_and_read())
        await begun.wait()
        cancel_when_executed(engine, task)
        with pytest.raises(asyncio.CancelledError) as kept:
            await task
        async with asyncio.timeout(5), AsyncSession(engine) as session:
            await session.execute(UPDATE, {"key": key})
            await session.commit()
            found = (await session.execute(text("SELECT value FROM counters WHERE key_ = :key"), {"key": key})).scalar()
        assert found == 1, "what was cancelled was committed"
        assert kept.value is not None

    server.serves_tasks = True
    server.run(body, PoolSize(2))
    gc.collect()


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_connection_that_is_rolled_back_on_its_return_has_its_place(server: Server, how: str) -> None:
    """A transaction was left open on it; whoever gives it back is cancelled at one `await` after the other."""

    async def body(engine: AsyncEngine) -> None:
        returning: list[Any] = []

        def leave_open() -> None:
            returning.clear()
            with contextlib.closing(engine.sync_engine.raw_connection()) as connection:
                cursor = connection.cursor()
                cursor.execute("BEGIN" if server.driver in {"aiosqlite", "asyncpg"} else "SELECT 1")
                cursor.execute("INSERT INTO users (name) VALUES ('left')")
                cursor.close()
                returning.append(connection)

        for number in range(1, 100):
            await greenlet_spawn(leave_open)  # a connection is there, so that each time the same is awaited
            strikes: list[Any] = []

            def strike(waits: Any, strikes: list[Any] = strikes) -> None:
                task: Any = asyncio.current_task()
                strikes.append(task)
                if how == "before" or waits is None:
                    task.cancel()
                else:
                    waits.add_done_callback(lambda _: task.cancel())

            async def whole(number: int = number, strike: Any = strike) -> None:
                await struck(greenlet_spawn(leave_open), number, strike, lambda: bool(returning))

            task = asyncio.create_task(whole())
            await asyncio.wait([task])
            await settled(engine)
            if not strikes:
                break
            assert task.cancelled()
        assert number > 1, "nothing was struck"

    server.run(body, PoolSize(1))
    assert server.database.rows("left") == []
