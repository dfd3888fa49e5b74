"""Coroutines inside a greenlet, and what stops them: on plain asyncio, without Celery."""

import asyncio
import contextlib
import contextvars
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.util import await_only, concurrency

from celery_alchemy.strategies.asynchronous import hosting
from celery_alchemy.strategies.asynchronous.hosting import Interruption, Killed, drive, host
from celery_alchemy.strategies.interrupts import current_interruption


class SoftLimit(Exception, asyncio.CancelledError):
    """As Celery's, for one that knows no Celery."""


def run(main: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 20))


def hosted(body: Callable[[], Any]) -> Any:
    """Run `body()` inside a greenlet, as a task's."""
    return concurrency.greenlet_spawn(lambda: host(body()))


async def driven(body: Callable[[], Any], interruption: Interruption, *, after: Callable[[], Any] | None = None) -> Any:
    """Run `body()` as a request does: armed, and then what ends the transaction."""

    def whole() -> Any:
        interruption.arm()
        try:
            result = host(body())
        finally:
            interruption.disarm()
        if after is not None:
            with interruption.held():
                await_only(after())
        return result

    return await drive(whole, interruption)


async def forever() -> None:
    await asyncio.Event().wait()


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def interrupted(
    body: Callable[[], Any], stop: Callable[[Interruption], None], after: Callable[[], Any] | None = None
) -> Any:
    """Run `body`, call `stop` once it waits, and return the result or what was raised."""
    interruption = Interruption(SoftLimit)

    async def outcome() -> Any:
        # A task that ends with a CancelledError gives a plain one to those that wait for it.
        try:
            return await driven(body, interruption, after=after)
        except BaseException as error:
            return error

    task = asyncio.ensure_future(outcome())
    await turns()
    stop(interruption)
    await asyncio.wait([task])
    assert interruption.task is None
    return task.result()


def test_a_hosted_coroutine_returns_raises_and_waits() -> None:
    async def body() -> str:
        await asyncio.sleep(0)
        with pytest.raises(KeyError):
            await asyncio.ensure_future(fails())
        return await asyncio.to_thread(lambda: "from a thread")

    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError

    assert run(lambda: hosted(body)) == "from a thread"

    async def failing() -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(lambda: hosted(failing))


def test_synchronous_code_in_a_hosted_coroutine_may_wait() -> None:
    def synchronous() -> str:
        return await_only(asyncio.sleep(0, "waited"))

    async def body() -> tuple[str, str]:
        # As an AsyncSession does it, in a greenlet of its own, and as a lazy load does it, in this one.
        return await concurrency.greenlet_spawn(synchronous), synchronous()

    assert run(lambda: hosted(body)) == ("waited", "waited")


def test_outside_of_a_greenlet_a_coroutine_that_waits_is_refused() -> None:
    async def main() -> None:
        with pytest.raises(MissingGreenlet):
            host(forever())

    run(main)


def test_context_variables_are_those_of_the_task() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")

    async def body(number: int) -> None:
        variable.set(number)
        for _ in range(5):
            await asyncio.sleep(0)
            assert variable.get() == number
        assert await asyncio.ensure_future(child()) == number
        assert await asyncio.to_thread(variable.get) == number

    async def child() -> int:
        await asyncio.sleep(0)
        return variable.get()

    async def main() -> None:
        await asyncio.gather(*(hosted(lambda number=number: body(number)) for number in range(50)))

    run(main)


def test_a_soft_limit_is_raised_at_the_innermost_await() -> None:
    seen = []

    async def inner() -> None:
        try:
            await forever()
        except SoftLimit as error:
            seen.append(error.args)
            raise

    assert isinstance(run(lambda: interrupted(inner, lambda one: one.soft(3))), SoftLimit)
    assert seen == [(3,)]


def test_a_caught_soft_limit_leaves_no_cancellation_behind() -> None:
    async def body() -> str:
        try:
            await forever()
        except SoftLimit:
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            await asyncio.sleep(0)
            return "caught"
        raise AssertionError

    assert run(lambda: interrupted(body, lambda one: one.soft(1))) == "caught"


@pytest.mark.parametrize("waits", ["group", "gather", "timeout", "greenlet", "child"])
def test_a_soft_limit_passes_through_what_asyncio_has(waits: str) -> None:
    ended = []

    async def child() -> None:
        try:
            await forever()
        finally:
            ended.append("child")

    async def body() -> None:
        if waits == "group":
            async with asyncio.TaskGroup() as group:
                group.create_task(child())
        elif waits == "gather":
            await asyncio.gather(child(), child())
        elif waits == "timeout":
            async with asyncio.timeout(15):
                await child()
        elif waits == "greenlet":
            await concurrency.greenlet_spawn(lambda: await_only(child()))
        else:
            await asyncio.ensure_future(child())

    assert isinstance(run(lambda: interrupted(body, lambda one: one.soft(1))), SoftLimit)
    assert set(ended) == {"child"}


def test_a_soft_limit_that_a_child_swallows_is_raised_where_it_is_awaited() -> None:
    async def child() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await forever()
        return "swallowed"

    async def body() -> str:
        return await asyncio.ensure_future(child())

    assert isinstance(run(lambda: interrupted(body, lambda one: one.soft(1))), SoftLimit)


def test_a_timeout_of_the_bodys_own_stays_one() -> None:
    async def body() -> None:
        async with asyncio.timeout(0.01):
            await forever()

    assert isinstance(run(lambda: interrupted(body, lambda one: None)), TimeoutError)


def test_a_soft_limit_before_the_body_is_raised_as_it_begins() -> None:
    begun = []

    async def body() -> None:
        begun.append(True)

    async def main() -> None:
        interruption = Interruption(SoftLimit)
        interruption.soft(1)
        with pytest.raises(SoftLimit):
            await driven(body, interruption)

    run(main)
    assert begun == []


def test_a_soft_limit_after_the_body_has_no_effect() -> None:
    async def body() -> str:
        return "done"

    async def main() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def commit() -> None:
            begun.set()
            await go_on.wait()

        interruption = Interruption(SoftLimit)
        task = asyncio.ensure_future(driven(body, interruption, after=commit))
        await begun.wait()
        interruption.soft(1)
        await turns()
        assert not task.done()
        go_on.set()
        assert await task == "done"

    run(main)


@pytest.mark.parametrize("goes_on", [False, True], ids=["returns", "goes on"])
def test_a_soft_limit_in_a_commit_of_the_body_waits_for_its_end(goes_on: bool) -> None:
    """A body that returns then has done its work, and it is committed."""

    async def main() -> None:
        begun, go_on, steps = asyncio.Event(), asyncio.Event(), []
        interruption = Interruption(SoftLimit)

        async def body() -> None:
            try:
                with hosting.held():
                    begun.set()
                    await go_on.wait()
                    steps.append("committed")
                hosting.check_later()
                if goes_on:
                    await asyncio.sleep(60)
            except SoftLimit:
                steps.append("limit")
                raise

        task = asyncio.ensure_future(driven(body, interruption))
        await begun.wait()
        interruption.soft(1)
        await turns()
        go_on.set()
        with pytest.raises(SoftLimit) if goes_on else nullcontext():
            await task
        assert steps == (["committed", "limit"] if goes_on else ["committed"])

    run(main)


def test_a_body_that_runs_again_is_interrupted_again() -> None:
    async def main() -> None:
        interruption = Interruption(SoftLimit)

        def twice() -> str:
            interruption.arm()
            interruption.disarm()
            await_only(asyncio.sleep(0.01))  # the pause between two attempts
            try:
                interruption.arm()
            except SoftLimit:
                return "raised"
            return "lost"

        task = asyncio.ensure_future(drive(twice, interruption))
        await asyncio.sleep(0)
        interruption.soft(1)
        assert await task == "raised"

    run(main)


def test_a_kill_ends_what_has_not_begun() -> None:
    async def main() -> None:
        interruption = Interruption(SoftLimit)
        interruption.kill()
        with pytest.raises(Killed):
            await drive(lambda: host(forever()), interruption)

    run(main)


def test_a_swallowed_kill_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting, "REPEAT_S", 0.01)
    swallowed = []

    async def body() -> None:
        while len(swallowed) < 3:
            try:
                await forever()
            except asyncio.CancelledError as error:
                swallowed.append(type(error))
        await forever()

    assert isinstance(run(lambda: interrupted(body, Interruption.kill)), Killed)
    assert swallowed == [Killed] * 3


@pytest.mark.parametrize("shutdown", [False, True])
def test_a_kill_waits_for_a_commit_unless_the_process_ends(shutdown: bool) -> None:
    async def main() -> None:
        begun, go_on, steps = asyncio.Event(), asyncio.Event(), []

        async def body() -> None:
            return None

        async def commit() -> None:
            begun.set()
            await go_on.wait()
            steps.append("committed")

        interruption = Interruption(SoftLimit)
        task = asyncio.ensure_future(driven(body, interruption, after=commit))
        await begun.wait()
        interruption.kill(shutdown=shutdown)
        await turns()
        assert task.done() is shutdown
        go_on.set()
        await asyncio.wait([task])
        assert steps == ([] if shutdown else ["committed"])

    run(main)


def test_a_kill_takes_the_place_of_a_soft_limit() -> None:
    def stop(interruption: Interruption) -> None:
        interruption.soft(1)
        interruption.kill()
        interruption.soft(1)

    assert isinstance(run(lambda: interrupted(forever, stop)), Killed)


def test_a_cancellation_that_nobody_asked_for_stays_one() -> None:
    async def main() -> None:
        interruption = Interruption(SoftLimit)
        task = asyncio.ensure_future(driven(forever, interruption))
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert type(caught.value) is asyncio.CancelledError

    run(main)


def test_children_see_whose_request_they_run_in() -> None:
    async def main() -> None:
        async def body() -> None:
            seen = [current_interruption.get(), await asyncio.ensure_future(child())]
            assert seen == [interruption, interruption]

        async def child() -> Interruption | None:
            return current_interruption.get()

        interruption = Interruption(SoftLimit)
        await driven(body, interruption)
        assert current_interruption.get() is None

    run(main)
