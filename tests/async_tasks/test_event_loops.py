"""Event loops of other kinds, and what is left when one has ended."""

import asyncio
import importlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.util import await_only
from support.async_shop import Shop, add
from support.databases import PostgreSQL
from support.waiting import eventually

from celery_alchemy.strategies.asynchronous import loop_thread


@pytest.fixture
def uvloop() -> Iterator[Any]:
    """uvloop, as `uvloop.install()` makes it the kind of every new event loop."""
    try:
        found = importlib.import_module("uvloop")
    except ImportError:
        pytest.skip("uvloop is not installed")
    before = asyncio.get_event_loop_policy()
    loop_thread.stop()
    asyncio.set_event_loop_policy(found.EventLoopPolicy())
    yield found
    asyncio.set_event_loop_policy(before)
    loop_thread.stop()


def test_tasks_run_on_uvloop(uvloop: Any, shop: Shop, run_database: PostgreSQL, key: str) -> None:
    async def body(task: Any) -> bool:
        await add(task, key)
        await task.db.commit()
        ones = await asyncio.gather(child(), child())
        assert ones == [1, 1]
        await add(task, key, "later")
        return isinstance(asyncio.get_running_loop(), uvloop.Loop)

    async def child() -> Any:
        async with shop.db.async_unit_of_work() as session:
            return await session.scalar(text("SELECT 1"))

    async def fails(task: Any) -> None:
        await add(task, key, "rolled back")
        raise KeyError

    assert shop.run(body)
    with pytest.raises(KeyError):
        shop.run(fails)
    assert run_database.rows(key) == ["added", "later"]


def test_no_thread_of_aiosqlite_is_left_when_the_event_loop_has_ended(tmp_path: Path) -> None:
    """It has one for each connection, and SQLAlchemy keeps those that are idle."""
    loop_thread.stop()
    before = set(threading.enumerate())
    shop = Shop(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}")

    async def body(task: Any) -> Any:
        return await task.db.scalar(text("SELECT 1"))

    assert shop.run(body) == 1
    assert len(set(threading.enumerate()) - before) > 1, "no thread but that of the event loop: this shows nothing"
    shop.db.coroutines.stop()
    shop.app.close()
    loop_thread.stop()
    eventually(lambda: set(threading.enumerate()) <= before, "its threads have ended")


SCRIPT = """
import asyncio, sys
from celery import Celery
from sqlalchemy import text
from sqlalchemy.util import await_only
from celery_alchemy import Alchemy

app = Celery("script", broker="memory://")
app.conf.alchemy_database_url = "sqlite+aiosqlite:///" + sys.argv[1]
db = Alchemy(app)

async def main():
    async with db.async_unit_of_work() as session:
        print(await session.scalar(text("SELECT 1")))

asyncio.run(main())
"""


def test_a_script_ends_whose_event_loop_has_ended(tmp_path: Path) -> None:
    """A connection that is idle in the pool has a thread, and the interpreter must not wait for it."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "script.db")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_who_waits_for_a_loop_that_is_stopped_waits_no_more() -> None:
    """A thread of a process that ends would keep it from ending, and a message of the outbox from being sent again."""
    thread = loop_thread.LoopThread()
    entered, found = threading.Event(), []

    def forever() -> None:
        entered.set()
        await_only(asyncio.sleep(1000))

    def wait() -> None:
        try:
            thread.run(forever)
        except RuntimeError as error:
            found.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert entered.wait(20)
    thread.stop()
    waiting.join(20)
    assert found == ["The event loop of this process was stopped while something waited for it."]
    with pytest.raises(RuntimeError, match="closed"):
        thread.run(forever)
