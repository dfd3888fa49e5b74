"""`async def` tasks that do what coroutines can do wrong, or in their own way."""

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Callable
from typing import Any

from celery import current_task
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import AsyncDatabaseTask
from support.project import tools
from support.project.app import app, db
from support.project.models import Row

variable: contextvars.ContextVar[str | None] = contextvars.ContextVar("trial", default=None)
trial = app.task(base=AsyncDatabaseTask, bind=True)
late = {"acks_late": True, "reject_on_worker_lost": True}
SLEEP = text("SELECT pg_sleep(30)")
SLOW_COMMIT = text("INSERT INTO slow_ (key_) VALUES (:key)")


# -- whose request, whose context, whose Session ---------------------------------------------------------------------

seen_in_listeners: dict[int, list[Any]] = {}


@event.listens_for(Session, "before_flush")
def before_flush(session: Session, *_: Any) -> None:
    notes = seen_in_listeners.get(id(session))
    if notes is not None:
        notes.append((current_task.request.id, variable.get(), db.async_session.sync_session is session))


@app.task(base=AsyncDatabaseTask, bind=True)
async def look_around(self: AsyncDatabaseTask, key: str, name: str, units: bool) -> list[str]:
    """Return what was seen of another request, before and after each await, anywhere."""
    wrong: list[str] = []
    mine = self.request.id
    assert variable.get() is None, "the context of another task"
    variable.set(name)

    def look(where: str) -> None:
        seen = (self.request.id, current_task.request.id, variable.get())
        if seen != (mine, mine, name):
            wrong.append(f"{where}: {seen} instead of {mine}")

    async def child(number: int) -> None:
        look("child")
        with contextlib.suppress(Exception):
            wrong.append(f"self.db in a child: {self.db}")
        await asyncio.sleep(0.001)
        look("child later")
        if units:
            async with db.async_unit_of_work() as session:
                if db.async_session is not session:
                    wrong.append("the Session of another unit of work in a child")
                session.add(Row(key=key, note=f"{name} child {number}"))
                await session.flush()
                look("child with a unit of work")
                if db.async_session is not session:
                    wrong.append("the Session of another unit of work in a child, after an await")
        look("child at its end")

    for round_ in range(2):
        look("body")
        if not units:
            session = self.db
            notes = seen_in_listeners.setdefault(id(session.sync_session), [])
            session.add(Row(key=key, note=f"{name} {round_}"))
            await session.flush()
            if session is not self.db or db.async_session is not session:
                wrong.append("the Session of another")
            wrong.extend(f"listener: {note}" for note in notes if note != (mine, name, True))
            if not notes:
                wrong.append("no listener was called")
            del seen_in_listeners[id(session.sync_session)]
        await asyncio.gather(child(1), child(2), asyncio.to_thread(look, "thread"))
        look("body after its children")
    return wrong


# -- two coroutines and one Session ----------------------------------------------------------------------------------


async def both(*calls: Any) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


async def in_task_group(call: Any) -> Any:
    async with asyncio.TaskGroup() as group:
        return await group.create_task(call)


async def begin_nested(session: Any) -> None:
    async with session.begin_nested():
        pass


SHARING: dict[str, Callable[[Any, str], Any]] = {
    "execute": lambda s, key: both(s.execute(text("SELECT 1")), s.execute(text("SELECT 2"))),
    "scalar": lambda s, key: both(s.scalar(text("SELECT 1"))),
    "stream": lambda s, key: both(s.stream(text("SELECT 1"))),
    "connection": lambda s, key: both(s.connection()),
    "flush": lambda s, key: both(s.flush()),
    "commit": lambda s, key: both(s.commit()),
    "rollback": lambda s, key: both(s.rollback()),
    "close": lambda s, key: both(s.close()),
    "invalidate": lambda s, key: both(s.invalidate()),
    "reset": lambda s, key: both(s.reset()),
    "begin_nested": lambda s, key: both(begin_nested(s)),
    "get": lambda s, key: both(s.get(Row, 1)),
    "run_sync": lambda s, key: both(s.run_sync(lambda sync: sync.execute(text("SELECT 1")))),
    "task group": lambda s, key: both(in_task_group(s.execute(text("SELECT 1")))),
    "shield": lambda s, key: both(asyncio.shield(s.execute(text("SELECT 1")))),
}


@app.task(base=AsyncDatabaseTask, bind=True)
async def share(self: AsyncDatabaseTask, key: str, how: str) -> list[str]:
    """Let a child use the Session; return the errors."""
    self.db.add(Row(key=key, note="before"))
    await self.db.flush()
    self.db.add(Row(key=key, note="pending"))
    found = await SHARING[how](self.db, key)
    errors = [error for one in found for error in (getattr(one, "exceptions", None) or [one])]
    return [f"{type(error).__name__}: {error}" for error in errors]


# -- cancellations of the task's own ---------------------------------------------------------------------------------


@app.task(base=AsyncDatabaseTask, bind=True)
async def cut(self: AsyncDatabaseTask, key: str, how: str, rolls_back: bool = True) -> str:
    """End a statement by a time-out of the task's own, and go on."""
    self.db.add(Row(key=key, note="before"))
    await self.db.flush()
    try:
        if how == "timeout":
            async with asyncio.timeout(0.1):
                await self.db.execute(SLEEP)
        elif how == "anyio":
            import anyio

            with anyio.fail_after(0.1):
                await self.db.execute(SLEEP)
        elif how == "group":
            async with asyncio.timeout(0.1), asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(30))
                await self.db.execute(SLEEP)
        elif how == "unit":
            async with asyncio.timeout(0.1), db.async_unit_of_work() as session:
                session.add(Row(key=key, note="inner"))
                await session.execute(SLEEP)
        elif how == "anyio unit":
            import anyio

            with anyio.fail_after(0.1):
                async with db.async_unit_of_work() as session:
                    session.add(Row(key=key, note="inner"))
                    await session.flush()
                    await session.execute(SLEEP)
        elif how == "anyio group":
            import anyio

            with anyio.fail_after(0.1):
                async with anyio.create_task_group() as children:
                    for _ in range(3):
                        children.start_soon(sleep_in_unit, key)
                    await asyncio.sleep(30)
    except TimeoutError:
        if rolls_back:
            await self.db.rollback()
    self.db.add(Row(key=key, note="after"))
    return "went on"


async def sleep_in_unit(key: str) -> None:
    async with db.async_unit_of_work() as session:
        session.add(Row(key=key, note="of a child"))
        await session.flush()
        await session.execute(SLEEP)


@app.task(base=AsyncDatabaseTask, bind=True)
async def ordinary_unit(self: AsyncDatabaseTask, key: str) -> int:
    """Open an ordinary unit of work in a thread; return how often another coroutine ran meanwhile."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.02)
            ticks += 1

    def work() -> None:
        with db.unit_of_work() as session:
            session.add(Row(key=key, note="of the thread"))
            session.execute(text("SELECT pg_sleep(0.5)"))

    ticking = asyncio.create_task(tick())
    self.db.add(Row(key=key, note="of the task"))
    await self.db.flush()
    await asyncio.to_thread(work)
    ticking.cancel()
    return ticks


# -- limits in COMMITs -----------------------------------------------------------------------------------------------


async def slow_commit(session: Any, key: str) -> None:
    session.add(Row(key=key, note="committed slowly"))
    await session.flush()
    await session.execute(SLOW_COMMIT, {"key": key})
    tools.say(key, "before the COMMIT")


@app.task(base=AsyncDatabaseTask, bind=True)
async def commit_slowly(self: AsyncDatabaseTask, key: str, how: str, goes_on: bool) -> str:
    """A time limit comes in a COMMIT, after which there is much more to do, or nothing."""
    if how == "commit":
        await slow_commit(self.db, key)
        await self.db.commit()
    elif how == "begin":
        async with self.db.begin():
            await slow_commit(self.db, key)
    elif how == "transaction":
        transaction = await self.db.begin()
        await slow_commit(self.db, key)
        await transaction.commit()
    elif how == "nested":
        async with db.async_unit_of_work() as session:
            await slow_commit(session, key)
    elif how == "called":
        await db_called(self, key)
    elif how == "end":
        await slow_commit(self.db, key)
    elif how == "connection":
        async with db.async_engine.connect() as connection:
            await slow_core(connection, key)
            await connection.commit()
    elif how == "engine":
        async with db.async_engine.begin() as connection:
            await slow_core(connection, key)
    elif how == "own session":
        async with AsyncSession(db.async_engine) as session, session.begin():
            await slow_commit(session, key)
    elif how == "applied":
        written_slowly.apply((key,), throw=True)
    elif how == "child":
        await asyncio.create_task(commit_in_child(key))
    if goes_on:
        await asyncio.sleep(20)
    return "ended"


@trial
async def written_slowly(self: AsyncDatabaseTask, key: str) -> None:
    await slow_commit(self.db, key)


async def slow_core(connection: Any, key: str) -> None:
    await connection.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, 'committed slowly')"), {"key": key})
    await connection.execute(SLOW_COMMIT, {"key": key})


async def db_called(task: Any, key: str) -> None:
    await slow_commit(task.db, key)
    task.db.sync_session.commit()


async def commit_in_child(key: str) -> None:
    async with db.async_unit_of_work() as session:
        await slow_commit(session, key)


# -- generators, streams, many units ---------------------------------------------------------------------------------


@app.task(base=AsyncDatabaseTask, bind=True)
async def leave_stream_open(self: AsyncDatabaseTask, key: str) -> int:
    self.db.add(Row(key=key, note="before"))
    found = await self.db.stream(text("SELECT generate_series(1, 5000)"))
    async for (number,) in found:
        if number == 3:
            break
    return 3


kept: list[Any] = []


@app.task(base=AsyncDatabaseTask, bind=True)
async def leave_generator_open(self: AsyncDatabaseTask, key: str, keeps: bool) -> str:
    """A unit of work in an asynchronous generator that nothing closes."""

    async def sessions() -> AsyncIterator[Any]:
        async with db.async_unit_of_work() as session:
            session.add(Row(key=key, note="in the generator"))
            await session.flush()
            yield session

    self.db.add(Row(key=key, note="of the task"))
    generator = sessions()
    async for session in generator:
        await session.execute(text("SELECT 1"))
        break
    if keeps:
        kept.append(generator)
    return "left"


@app.task
async def drop_kept() -> int:
    count = len(kept)
    kept.clear()
    await asyncio.sleep(0.2)
    return count


@app.task(base=AsyncDatabaseTask, bind=True)
async def many_units(self: AsyncDatabaseTask, key: str, holds: bool, many: int = 200) -> dict[str, int]:
    """Children that open units of work, while the task holds a connection or not."""
    if holds:
        self.db.add(Row(key=key, note="of the task"))
        await self.db.flush()
    counts: dict[str, int] = {}

    async def child(number: int) -> None:
        try:
            async with db.async_unit_of_work() as session:
                session.add(Row(key=key, note=f"child {number}"))
                await session.flush()
                await session.execute(text("SELECT pg_sleep(0.001)"))
            name = "done"
        except Exception as error:
            name = type(error).__name__
        counts[name] = counts.get(name, 0) + 1

    await asyncio.gather(*map(child, range(many)))
    return counts


@app.task(base=AsyncDatabaseTask, bind=True)
async def leave_child_running(self: AsyncDatabaseTask, key: str, seconds: float) -> str:
    """A child with a unit of work outlives the task."""

    async def child() -> None:
        async with db.async_unit_of_work() as session:
            session.add(Row(key=key, note="of the child"))
            await session.flush()
            await asyncio.sleep(seconds)

    self.db.add(Row(key=key, note="of the task"))
    kept.append(asyncio.create_task(child()))
    await asyncio.sleep(0.05)
    return "left"


@app.task(base=AsyncDatabaseTask, bind=True)
async def raise_group(self: AsyncDatabaseTask, key: str) -> None:
    self.db.add(Row(key=key))
    await self.db.flush()

    async def fail() -> None:
        raise ValueError("in a group")

    async with asyncio.TaskGroup() as group:
        group.create_task(fail())
        group.create_task(asyncio.sleep(30))
