"""Tasks of coroutines that need no database: `async def` of plain Celery, and what shares the event loop with them."""

import asyncio
import contextvars
import time
from typing import Any

from celery import current_task
from celery.exceptions import SoftTimeLimitExceeded

from support.project import tools
from support.project.app import app

BEAT_S = 0.02
LATE = {"acks_late": True, "reject_on_worker_lost": True}
#: Of the test: a task of another request would leave its own value here, if contexts were shared.
variable: contextvars.ContextVar[str | None] = contextvars.ContextVar("variable", default=None)


@app.task
async def add(x: int, y: int) -> int:
    await asyncio.sleep(0)
    return x + y


@app.task
def add_in_thread(x: int, y: int) -> int:
    return x + y


@app.task
async def fail(message: str) -> None:
    await asyncio.sleep(0)
    raise ValueError(message)


def noted(key: str, request: Any, note: str) -> None:
    tools.say(key, {"id": request.id, "note": note, "redelivered": request.delivery_info.get("redelivered")})


async def slept(task: Any, key: str, seconds: float) -> str:
    """Say when it begins, when it ends, and by what."""
    noted(key, task.request, "begun")
    try:
        await asyncio.sleep(seconds)
    except SoftTimeLimitExceeded:
        noted(key, task.request, "soft limit")
        raise
    except asyncio.CancelledError:
        noted(key, task.request, "cancelled")
        raise
    noted(key, task.request, "ended")
    return "slept"


@app.task(bind=True)
async def sleep(self: Any, key: str, seconds: float) -> str:
    return await slept(self, key, seconds)


@app.task(bind=True, **LATE)
async def sleep_late(self: Any, key: str, seconds: float) -> str:
    return await slept(self, key, seconds)


@app.task(bind=True)
async def catch_limit(self: Any, key: str) -> str:
    try:
        return await slept(self, key, 30)
    except SoftTimeLimitExceeded:
        await asyncio.sleep(0.01)
        return "caught"


@app.task(bind=True)
async def swallow(self: Any, key: str, seconds: float) -> str:
    """Go on whatever happens, for so long."""
    until = time.monotonic() + seconds
    noted(key, self.request, "begun")
    times = 0
    while time.monotonic() < until:
        try:
            await asyncio.sleep(until - time.monotonic())
        except BaseException:
            times += 1
    noted(key, self.request, f"hit {min(times, 2)}")
    return "went on"


@app.task(bind=True)
async def in_group(self: Any) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(30))
        group.create_task(asyncio.sleep(40))


@app.task(bind=True, max_retries=3)
async def retried(self: Any) -> int:
    await asyncio.sleep(0)
    if self.request.retries < 2:
        try:
            raise self.retry(countdown=0)
        except ValueError:
            return -1
    return int(self.request.retries)


@app.task(bind=True, autoretry_for=(ValueError,), max_retries=3, retry_kwargs={"countdown": 0})
async def retried_by_itself(self: Any) -> int:
    await asyncio.sleep(0)
    if self.request.retries < 2:
        raise ValueError("again")
    return int(self.request.retries)


@app.task(bind=True)
async def same_request(self: Any, name: str) -> list[str]:
    """Look at the request, and at a variable of its context, before and after each wait, in children and threads."""
    seen: list[Any] = []

    def look() -> None:
        seen.append((self.request.id, current_task.request.id, variable.get()))

    async def child() -> None:
        look()
        await asyncio.sleep(0.001)
        look()

    assert variable.get() is None, "the context of another task"
    variable.set(name)
    for _ in range(5):
        look()
        await asyncio.sleep(0.001)
        await asyncio.gather(child(), asyncio.create_task(child()), asyncio.to_thread(look))
    look()
    return [repr(one) for one in set(seen) if one != (self.request.id, self.request.id, name)]


@app.task(bind=True)
def same_request_in_thread(self: Any, name: str) -> list[str]:
    assert variable.get() is None, "the context of another task"
    variable.set(name)
    time.sleep(0.002)
    seen = (self.request.id, current_task.request.id, variable.get())
    return [] if seen == (self.request.id, self.request.id, name) else [repr(seen)]


@app.task
async def block(seconds: float) -> str:
    time.sleep(seconds)
    return "blocked"


async def waits_in_a_child(seconds: float) -> None:
    time.sleep(seconds)


@app.task
async def block_in_child(seconds: float) -> str:
    await asyncio.create_task(waits_in_a_child(seconds))
    return "blocked"


@app.task
def wait_in_thread(seconds: float) -> str:
    time.sleep(seconds)
    return "waited"


@app.task(ignore_result=True)
async def heartbeat(key: str, seconds: float) -> None:
    """Say how long the loop has been silent at most, and how long a thread beside it, which nothing of ours blocks."""
    beside = asyncio.create_task(asyncio.to_thread(silence_of_thread, seconds))
    longest, last = 0.0, time.monotonic()
    until = last + seconds
    while last < until:
        await asyncio.sleep(BEAT_S)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    await asyncio.to_thread(tools.say, key, [round(longest - BEAT_S, 3), await beside])


def silence_of_thread(seconds: float) -> float:
    longest, last = 0.0, time.monotonic()
    until = last + seconds
    while last < until:
        time.sleep(BEAT_S)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    return round(longest - BEAT_S, 3)


@app.task
async def send(times: int) -> int:
    """Publish from a coroutine."""
    for number in range(times):
        add.apply_async((number, 1), ignore_result=True)
    return times


@app.task
async def exit_child() -> str:
    """A child ends itself as a process would."""

    async def child() -> None:
        raise SystemExit(3)

    asyncio.get_running_loop().create_task(child())
    await asyncio.sleep(0.05)
    return "alive"


@app.task(**LATE)
async def exit_itself() -> None:
    raise SystemExit(3)


@app.task
async def cancel_itself() -> None:
    raise asyncio.CancelledError


@app.task
async def send_when_told(key: str, times: int) -> int:
    """Publish from a coroutine, once the test says so."""
    while not await asyncio.to_thread(tools.client().exists, tools.name("go", key)):
        await asyncio.sleep(0.05)
    for number in range(times):
        add.apply_async((number, 1), ignore_result=True)
    return times


@app.task
async def wait_in_thread_of_loop(seconds: float) -> str:
    await asyncio.to_thread(time.sleep, seconds)
    return "waited"


@app.task
async def meet_in_threads(key: str, parties: int) -> str:
    """Each waits for all others, in a thread of the loop's."""
    await asyncio.to_thread(tools.barrier, key, parties)
    return "met"
