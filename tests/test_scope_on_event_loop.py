"""Whose a Scope is where coroutines run: the greenlet that hosts one, or the asyncio task; never the loop's thread."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy.ext.asyncio  # noqa: F401 - as an application that has an AsyncSession
from sqlalchemy.util import concurrency

from celery_alchemy.strategies.asynchronous.hosting import Interruption, drive, host
from celery_alchemy.strategies.scope import Scope, here, own_scope


def run(main: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 20))


async def in_greenlet() -> Scope:
    """As a listener of an AsyncSession sees it."""
    return await concurrency.greenlet_spawn(here)


async def as_a_request(function: Callable[[], Any]) -> Any:
    return await drive(function, Interruption(lambda _: asyncio.CancelledError()))


@pytest.mark.parametrize("spawn", [concurrency.greenlet_spawn, as_a_request])
def test_what_a_hosted_coroutine_calls_is_in_the_scope_of_its_greenlet(spawn: Callable[..., Any]) -> None:
    async def body(own: Scope) -> Scope:
        await asyncio.sleep(0)
        assert here() is own
        assert await in_greenlet() is own
        assert await in_greenlet() is own
        assert own_scope() is own
        return own

    def request() -> Scope:
        own = here()
        return host(body(own))

    async def main() -> None:
        found = await asyncio.gather(*(spawn(request) for _ in range(20)))
        assert len(set(map(id, found))) == 20

    run(main)


@pytest.mark.parametrize("spawn", [concurrency.greenlet_spawn, as_a_request])
def test_children_of_two_requests_have_scopes_of_their_own(spawn: Callable[..., Any]) -> None:
    async def child(theirs: Scope) -> Scope:
        await asyncio.sleep(0)
        assert here() is not theirs
        own = own_scope()
        await asyncio.sleep(0)
        assert here() is own
        assert await in_greenlet() is own
        return own

    def request() -> list[Scope]:
        theirs = here()

        async def body() -> list[Scope]:
            found = await asyncio.gather(child(theirs), child(theirs))
            assert here() is theirs
            return [theirs, *found]

        return host(body())

    async def main() -> None:
        found = await asyncio.gather(*(spawn(request) for _ in range(20)))
        assert len({id(scope) for scopes in found for scope in scopes}) == 60

    run(main)


def test_a_thread_has_its_scope_again_after_the_event_loop() -> None:
    before = here()

    async def main() -> None:
        assert here() is before
        own = own_scope()
        assert here() is own is not before
        assert await asyncio.ensure_future(other()) is before

    async def other() -> Scope:
        return here()

    run(main)
    assert here() is before
