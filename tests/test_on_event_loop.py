"""Callbacks of the COMMIT of an AsyncSession: `await session.commit()` waits for them, and the event loop goes on."""

import asyncio
import contextvars
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from support.databases import PostgreSQL
from support.shop import Shop
from support.silent_broker import SilentBroker
from support.waiting import eventually

from celery_alchemy import CeleryAlchemyError

Body = Callable[[AsyncSession], Awaitable[None]]


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path / "shop.db")
    yield shop
    shop.close()


@pytest.fixture
def run(shop: Shop, run_database: PostgreSQL) -> Callable[[Body], None]:
    """Run a coroutine as a request with an AsyncSession that is followed."""

    async def request(body: Body) -> None:
        engine = create_async_engine(run_database.url("on-event-loop"))
        try:
            async with AsyncSession(engine) as session:
                with shop.db.follow(session):
                    await body(session)
        finally:
            await engine.dispose()

    return lambda body: asyncio.run(asyncio.wait_for(request(body), 60))


def test_the_awaited_commit_has_sent(shop: Shop, run: Callable[[Body], None]) -> None:
    async def body(session: AsyncSession) -> None:
        early = shop.rename.delay_on_commit("ada").id
        await session.execute(text("SELECT 1"))
        late = shop.rename.delay_on_commit("bob").id
        assert shop.sent() == []
        await session.commit()
        assert shop.sent() == [early, late]
        async with session.begin():
            third = shop.rename.delay_on_commit("ada").id
            await session.execute(text("SELECT 1"))
        assert shop.sent() == [third]
        shop.rename.delay_on_commit("ada")
        await session.rollback()
        async with session.begin_nested() as savepoint:
            shop.rename.delay_on_commit("ada")
            await savepoint.rollback()
        await session.commit()
        assert shop.sent() == []

    run(body)


def test_the_owner_may_begin_the_transaction(shop: Shop, run: Callable[[Body], None]) -> None:
    async def body(session: AsyncSession) -> None:
        task_id = shop.rename.delay_on_commit("ada").id
        async with session.begin():
            await session.execute(text("SELECT 1"))
        assert shop.sent() == [task_id]

    run(body)


def test_a_broker_that_does_not_answer_stops_no_other_coroutine(
    shop: Shop, run: Callable[[Body], None], caplog: pytest.LogCaptureFixture
) -> None:
    """It hangs up when another coroutine of the same loop tells it to."""
    broker = SilentBroker()
    shop.app.conf.update(broker_url=broker.url, task_publish_retry=False)
    order: list[str] = []

    async def other() -> None:
        while not broker.asked.is_set():
            await asyncio.sleep(0.01)
        order.append("the loop goes on")
        broker.hang_up()

    async def body(session: AsyncSession) -> None:
        helper = asyncio.create_task(other())
        result = shop.rename.delay_on_commit("ada")
        await session.commit()
        order.append("committed")
        await helper
        assert f"sending {shop.rename.name}[{result.id}]" in caplog.text

    run(body)
    assert order == ["the loop goes on", "committed"]


def test_many_stalled_commits_leave_the_loops_own_threads_alone(shop: Shop, run: Callable[[Body], None]) -> None:
    """Those look up addresses, for example of the database."""
    stalled = threading.Event()

    async def body(session: AsyncSession) -> None:
        tasks = []
        for _ in range(40):
            one = AsyncSession(session.bind)
            shop.db.on_commit(lambda: stalled.wait(50), session=one)
            tasks.append(asyncio.create_task(one.commit()))
        await asyncio.sleep(0)
        assert await asyncio.to_thread(lambda: "runs") == "runs"
        stalled.set()
        await asyncio.gather(*tasks)

    run(body)


def test_a_cancelled_request_sends_what_it_has_committed(shop: Shop, run: Callable[[Body], None]) -> None:
    entered, released = threading.Event(), threading.Event()
    ran: list[str] = []

    async def awaited() -> None:
        ran.append("awaited")

    async def body(session: AsyncSession) -> None:
        @shop.db.on_commit
        def slow() -> None:
            entered.set()
            released.wait(50)

        first = shop.rename.delay_on_commit("ada").id
        shop.db.on_commit(awaited)
        shop.db.on_commit(awaited)
        second = shop.rename.delay_on_commit("bob").id
        commit = asyncio.create_task(session.commit())
        while not entered.is_set():
            await asyncio.sleep(0.01)
        commit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await commit
        assert shop.sent() == []
        released.set()
        sent: list[str] = []
        await asyncio.to_thread(eventually, lambda: sent.extend(shop.sent()) or len(sent) == 2, "both are sent")
        assert sent == [first, second]
        while len(ran) < 2:
            await asyncio.sleep(0.01)

    run(body)


def test_a_request_that_is_cancelled_in_a_coroutine_sends_what_it_has_committed(
    shop: Shop, run: Callable[[Body], None]
) -> None:
    ran: list[str] = []

    async def body(session: AsyncSession) -> None:
        entered, released = asyncio.Event(), asyncio.Event()

        @shop.db.on_commit
        async def slow() -> None:
            entered.set()
            await released.wait()
            ran.append("slow")

        @shop.db.on_commit
        async def next_one() -> None:
            ran.append("next")

        ids = [shop.rename.delay_on_commit(name).id for name in ("ada", "bob")]
        commit = asyncio.create_task(session.commit())
        await entered.wait()
        commit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await commit
        sent: list[str] = []
        await asyncio.to_thread(eventually, lambda: sent.extend(shop.sent()) or len(sent) == 2, "both are sent")
        assert sent == ids
        released.set()
        while sorted(ran) != ["next", "slow"]:
            await asyncio.sleep(0.01)

    run(body)


def test_a_loop_that_ends_waits_for_what_is_sent(shop: Shop, run_database: PostgreSQL) -> None:
    entered, released = threading.Event(), threading.Event()

    async def request() -> None:
        engine = create_async_engine(run_database.url("on-event-loop"))
        session = AsyncSession(engine)
        shop.db.on_commit(lambda: entered.set() or released.wait(50), session=session)
        shop.rename.apply_async_on_commit(("ada",), session=session)
        commit = asyncio.create_task(session.commit())
        while not entered.is_set():
            await asyncio.sleep(0.01)
        commit.cancel()
        await engine.dispose()

    asyncio.run(request())
    released.set()
    sent: list[str] = []
    eventually(lambda: sent.extend(shop.sent()) or len(sent) == 1, "it is sent")


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")


def test_plain_functions_run_in_a_thread_and_coroutines_on_the_loop(shop: Shop, run: Callable[[Body], None]) -> None:
    """In their order, each with the context of the request."""
    ran: list[Any] = []

    def plain() -> None:
        ran.append((variable.get(), threading.current_thread() is threading.main_thread()))

    async def awaited() -> None:
        await asyncio.sleep(0)
        ran.append((variable.get(), threading.current_thread() is threading.main_thread()))
        shop.rename.delay_on_commit("there is nothing to wait for any more")

    async def body(session: AsyncSession) -> None:
        variable.set("of the request")
        for callback in (plain, awaited, plain, plain, awaited):
            shop.db.on_commit(callback)
        await session.commit()

    run(body)
    assert ran == [("of the request", on_loop) for on_loop in (False, True, False, False, True)]
    assert len(shop.sent()) == 2


def test_errors_are_logged_or_raised(shop: Shop, run: Callable[[Body], None], caplog: pytest.LogCaptureFixture) -> None:
    ran: list[str] = []

    def fails() -> None:
        raise ZeroDivisionError

    async def fails_too() -> None:
        raise LookupError

    async def body(session: AsyncSession) -> None:
        shop.db.on_commit(fails)
        shop.db.on_commit(fails_too)
        shop.db.on_commit(lambda: ran.append("the last"))
        await session.commit()
        assert ran.pop() == "the last"
        for callback, error in ((fails, ZeroDivisionError), (fails_too, LookupError)):
            shop.db.on_commit(callback, raises=True)
            shop.db.on_commit(lambda: ran.append("the last"))
            with pytest.raises(error):
                await session.commit()
            assert ran.pop() == "the last"
            await session.execute(text("SELECT 1"))

    with caplog.at_level(logging.ERROR):
        run(body)
    assert len([one for one in caplog.records if "on_commit callback" in one.getMessage()]) == 4


@pytest.mark.parametrize("where", ["unit of work", "nowhere", "Session"])
def test_a_coroutine_is_refused_where_nothing_awaits_it(shop: Shop, where: str) -> None:
    from contextlib import nullcontext

    from sqlalchemy.orm import Session

    async def awaited() -> None: ...

    session = Session(shop.engine)
    blocks: dict[str, Any] = {"unit of work": shop.db.unit_of_work(), "Session": shop.db.follow(session)}
    with blocks.get(where, nullcontext()), pytest.raises(CeleryAlchemyError, match="`async def`"):
        shop.db.on_commit(awaited)
    session.close()


SLOW_COMMIT = (
    "CREATE TABLE slow_commits (id int)",
    """CREATE FUNCTION sleep_in_commit() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_sleep(50); RETURN NULL; END $$""",
    """CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON slow_commits DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION sleep_in_commit()""",
)
SLEEPING = """SELECT count(*) FROM pg_stat_activity
WHERE application_name LIKE '%on-event-loop' AND wait_event = 'PgSleep'"""


@pytest.fixture
def slow_commits(run_database: PostgreSQL) -> Iterator[None]:
    for statement in SLOW_COMMIT:
        run_database.execute(statement)
    yield
    run_database.execute("DROP TABLE slow_commits")
    run_database.execute("DROP FUNCTION sleep_in_commit")


@pytest.mark.usefixtures("slow_commits")
def test_a_request_that_is_cancelled_in_its_commit_says_what_it_drops(
    shop: Shop, run: Callable[[Body], None], run_database: PostgreSQL, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether the server has committed is not known."""

    async def body(session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO slow_commits VALUES (1)"))
        shop.rename.delay_on_commit("ada")
        request = asyncio.current_task()
        assert request is not None

        async def cancel() -> None:
            while run_database.column(SLEEPING) != [1]:
                await asyncio.sleep(0.01)
            request.cancel()

        helper = asyncio.create_task(cancel())
        try:
            await session.commit()
        finally:
            await helper

    with pytest.raises(asyncio.CancelledError):
        run(body)
    assert shop.sent() == []
    (said,) = [one.getMessage() for one in caplog.records if one.name.startswith("celery_alchemy")]
    assert "did not get to the end of its COMMIT" in said
    assert shop.rename.name in said
