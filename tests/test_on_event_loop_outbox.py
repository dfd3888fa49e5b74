"""The outbox under an AsyncSession: the event loop goes on, whatever the broker does."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from support.databases import PostgreSQL
from support.shop import Shop
from support.silent_broker import SilentBroker

Body = Callable[[AsyncSession], Awaitable[None]]

WAITING = "SELECT count(*) FROM celery_alchemy_outbox"


@pytest.fixture
def outbox(tmp_path: Path, run_database: PostgreSQL) -> Iterator[Shop]:
    shop = Shop(tmp_path / "outbox.db")
    shop.app.conf.update(alchemy_outbox=True, alchemy_database_url=run_database.url("outbox"))
    run_database.execute("DELETE FROM celery_alchemy_outbox")  # what tests before this one have left
    yield shop
    shop.close()
    run_database.execute("DELETE FROM celery_alchemy_outbox")


def request_of(shop: Shop, run_database: PostgreSQL, body: Body) -> None:
    async def request() -> None:
        engine = create_async_engine(run_database.url("on-event-loop"))
        try:
            async with AsyncSession(engine) as session:
                with shop.db.follow(session):
                    await body(session)
        finally:
            await engine.dispose()

    asyncio.run(asyncio.wait_for(request(), 60))


def test_messages_of_an_async_session_go_through_the_outbox(outbox: Shop, run_database: PostgreSQL) -> None:
    async def body(session: AsyncSession) -> None:
        first = outbox.rename.delay_on_commit("ada").id  # before the first statement
        await session.execute(text("SELECT 1"))
        second = outbox.rename.delay_on_commit("bob").id
        await session.commit()
        assert outbox.sent() == [first, second]
        async with session.begin():
            third = outbox.rename.delay_on_commit("ada").id
        assert outbox.sent() == [third]
        outbox.rename.delay_on_commit("ada")
        await session.rollback()

    request_of(outbox, run_database, body)
    assert outbox.sent() == []
    assert run_database.column(WAITING) == [0]


def test_with_the_outbox_a_broker_that_does_not_answer_stops_no_other_coroutine(
    outbox: Shop, run_database: PostgreSQL
) -> None:
    broker = SilentBroker()
    outbox.app.conf.update(broker_url=broker.url, task_publish_retry=False)
    order: list[str] = []

    async def other() -> None:
        while not broker.asked.is_set():
            await asyncio.sleep(0.01)
        order.append("the loop goes on")
        assert run_database.column(WAITING) == [1], "it is committed"
        broker.hang_up()

    async def body(session: AsyncSession) -> None:
        helper = asyncio.create_task(other())
        outbox.rename.delay_on_commit("ada")
        await session.commit()
        order.append("committed")
        await helper

    request_of(outbox, run_database, body)
    assert order == ["the loop goes on", "committed"]
    assert run_database.column(WAITING) == [1], "another sends it"
