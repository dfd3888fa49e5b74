"""`async def` tasks that publish, are ended from outside, or are many."""

import asyncio
import collections
import gc
import threading
from typing import Any

import psutil
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import text
from sqlalchemy.orm import object_session

from celery_alchemy import AsyncDatabaseTask
from support.project import tools
from support.project.app import app, db
from support.project.models import Row
from support.project.trials import SLEEP, late, slow_commit

# -- messages --------------------------------------------------------------------------------------------------------


@app.task
async def nothing() -> None:
    pass


@app.task(base=AsyncDatabaseTask, bind=True)
async def publish_everywhere(self: AsyncDatabaseTask, key: str, times: int) -> str:
    """Publish in the body, in children and in threads: they share the app's producers."""

    async def child() -> None:
        nothing.delay()
        await asyncio.sleep(0)
        nothing.delay()

    for _ in range(times):
        nothing.delay()
        await asyncio.gather(child(), child(), asyncio.to_thread(nothing.delay))
    return "published"


@app.task(base=AsyncDatabaseTask, bind=True)
async def command(self: AsyncDatabaseTask, key: str) -> str:
    """Tell workers something: Celery takes a connection for it, and then a producer."""
    for _ in range(3):
        self.app.control.revoke(key)
        await asyncio.sleep(0)
    return "told"


@app.task(base=AsyncDatabaseTask, bind=True)
async def call_back(self: AsyncDatabaseTask, key: str, how: str) -> str:
    """Callbacks after the COMMIT, one of which awaits."""

    async def later() -> None:
        await asyncio.sleep(0.01)
        async with db.async_unit_of_work() as session:
            session.add(Row(key=key, note="in the callback"))

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("in the callback")

    self.db.add(Row(key=key, note="of the task"))
    if how == "child":

        async def child() -> None:
            async with db.async_unit_of_work() as session:
                db.on_commit(later)
                session.add(Row(key=key, note="of the child"))

        await asyncio.create_task(child())
    else:
        db.on_commit(fails)
        db.on_commit(later)
        if how == "commit":
            await self.db.commit()
    return "called back"


@app.task(base=AsyncDatabaseTask, bind=True)
async def apply_here(self: AsyncDatabaseTask, key: str) -> list[str]:
    """In the task's own coroutine, and in a child."""
    self.db.add(Row(key=key, note="of the task"))
    await self.db.flush()
    own = self.db
    states = [insert.apply((key,)).state]
    assert self.db is own

    async def child() -> None:
        try:
            states.append(insert.apply((key,)).state)
        except Exception as error:
            states.append(f"{type(error).__name__}: {error}")

    await asyncio.create_task(child())
    return states


@app.task(base=AsyncDatabaseTask, bind=True)
async def insert(self: AsyncDatabaseTask, key: str) -> None:
    self.db.add(Row(key=key, note="applied"))


@app.task(base=AsyncDatabaseTask, bind=True, max_retries=2)
async def retry_anyhow(self: AsyncDatabaseTask, key: str, where: str) -> str:
    if self.request.retries == 0:
        self.db.add(Row(key=key, note="first attempt"))
        await self.db.flush()
        try:
            await asyncio.sleep(0)
            raise ValueError
        except Exception as error:
            if where == "child":

                async def child(reason: Exception = error) -> None:
                    raise self.retry(exc=reason, countdown=0)

                await asyncio.create_task(child())
            raise self.retry(exc=error, countdown=0) from error
    self.db.add(Row(key=key, note="second attempt"))
    return "retried"


# -- memory ----------------------------------------------------------------------------------------------------------


@app.task(base=AsyncDatabaseTask, bind=True)
async def write(self: AsyncDatabaseTask, key: str, number: int) -> None:
    """Be one of many: some fail, some have children."""
    self.db.add(Row(key=key, note=f"{number}"))
    await self.db.flush()
    if number % 10 == 1:
        raise ValueError(number)
    if number % 10 == 2:
        await asyncio.create_task(asyncio.sleep(0.001))
    if number % 10 == 3:
        await asyncio.gather(asyncio.to_thread(len, key), return_exceptions=True)


@app.task
def count_objects() -> dict[str, Any]:
    """Return how many objects there are of each class that belongs to a task, and what the process has in memory."""
    gc.collect()
    names = collections.Counter(type(one).__name__ for one in gc.get_objects())
    found = {name: count for name, count in names.items() if any(word in name.lower() for word in WORDS)}
    return {"objects": found, "rss_kb": psutil.Process().memory_info().rss // 1024}


WORDS = ("session", "transaction", "unitofwork", "job", "interruption", "identity", "coroutine", "greenlet", "report")


# -- the end ---------------------------------------------------------------------------------------------------------


@app.task(base=AsyncDatabaseTask, bind=True, **late)
async def clean_up(self: AsyncDatabaseTask, key: str, seconds: float) -> str:
    """Await in `except BaseException`, as clean-up code does."""
    self.db.add(Row(key=key, note="of the task"))
    await self.db.flush()
    tools.say(key, "begun")
    try:
        await self.db.execute(SLEEP)
    except BaseException as error:
        tools.say(key, type(error).__name__)
        await asyncio.sleep(seconds)
        tools.say(key, "cleaned up")
        raise
    return "slept"


@app.task(base=AsyncDatabaseTask, bind=True, **late)
async def wait_in(self: AsyncDatabaseTask, key: str, where: str) -> str:
    """Be in one phase of the life of a task when something comes."""
    if where == "connection":
        tools.say(key, "begun")
        await self.db.execute(text("SELECT 1"))
        return "connected"
    self.db.add(Row(key=key, note="of the task"))
    await self.db.flush()
    if where == "commit":
        await slow_commit(self.db, key)
        return "committed"
    tools.say(key, "begun")
    if where == "statement":
        await self.db.execute(SLEEP)
    elif where == "thread":
        await asyncio.to_thread(threading.Event().wait, 3)
    else:
        await asyncio.sleep(30)
    return "waited"


@app.task(base=AsyncDatabaseTask, bind=True)
async def swallow_limit(self: AsyncDatabaseTask, key: str) -> str:
    """Catch the limit in a statement, roll back and go on."""
    self.db.add(Row(key=key, note="before"))
    await self.db.flush()
    try:
        await self.db.execute(SLEEP)
    except SoftTimeLimitExceeded:
        await self.db.rollback()
    self.db.add(Row(key=key, note="after"))
    return "went on"


@app.task(base=AsyncDatabaseTask, bind=True)
async def object_lost(self: AsyncDatabaseTask, key: str) -> bool:
    row = Row(key=key, note="kept")
    self.db.add(row)
    await self.db.commit()
    return object_session(row) is self.db.sync_session
