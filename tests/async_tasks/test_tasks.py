"""`async def` tasks, run here and now: their AsyncSession, their children, and what is refused with the remedy."""

import asyncio
import uuid
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from celery import Celery
from celery.exceptions import Retry
from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from support.async_shop import Shop, add
from support.databases import PostgreSQL
from support.project.models import Row

from celery_alchemy import (
    Alchemy,
    AsyncDatabaseTask,
    CeleryAlchemyError,
    ConfigurationError,
    CurrentAsyncSession,
    CurrentSession,
    DatabaseTask,
    NoUnitOfWork,
    UseDatabase,
)
from celery_alchemy.strategies.errors import BodyCancelled, SharedSession
from celery_alchemy.strategies.scope import here

Start = Callable[..., Any]


def test_returning_commits_and_raising_rolls_back(shop: Shop, run_database: PostgreSQL, key: str) -> None:
    async def body(task: Any, *, fails: bool) -> str:
        await add(task, key, "fails" if fails else "returns")
        if fails:
            raise KeyError(key)
        return type(task.db).__mro__[1].__name__

    assert shop.task(body).apply(kwargs={"fails": False}, throw=True).result == "AsyncSession"
    with pytest.raises(KeyError):
        shop.task(body).apply(kwargs={"fails": True}, throw=True)
    assert run_database.rows(key) == ["returns"]


def test_two_operations_at_once_are_refused_before_the_driver_sees_them(shop: Shop) -> None:
    async def body(task: Any) -> str:
        seen: list[str] = []
        engine = shop.db.coroutines.strategy.engine
        event.listen(engine, "before_cursor_execute", lambda *args: seen.append(args[2]))
        with pytest.raises(SharedSession, match="async_unit_of_work"):
            await asyncio.gather(task.db.execute(text("SELECT 1")), task.db.execute(text("SELECT 2")))
        assert seen == []
        return str(await task.db.scalar(text("SELECT 'goes on'")))

    assert shop.run(body) == "goes on"


def test_a_child_opens_a_unit_of_work_of_its_own(shop: Shop, run_database: PostgreSQL, key: str) -> None:
    async def child(task: Any, number: int) -> None:
        with pytest.raises(NoUnitOfWork, match="async_unit_of_work"):
            _ = task.db
        with pytest.raises(NoUnitOfWork, match="async_unit_of_work"):
            _ = shop.db.async_session
        async with shop.db.async_unit_of_work() as session:
            assert shop.db.async_session is session
            session.add(Row(key=key, note=f"child {number}"))
            shop.db.on_commit(lambda: done.append(number))

    async def body(task: Any) -> None:
        await add(task, key, "parent")
        async with asyncio.TaskGroup() as group:
            group.create_task(child(task, 1))
        async with asyncio.TaskGroup() as group:
            group.create_task(child(task, 2))
        assert done == [1, 2]
        raise RuntimeError("only the parent's work is lost")

    done: list[int] = []
    with pytest.raises(RuntimeError):
        shop.run(body)
    assert run_database.rows(key) == ["child 1", "child 2"]


def test_a_thread_of_a_task_has_no_unit_of_work(shop: Shop) -> None:
    async def body(task: Any) -> None:
        def in_thread() -> None:
            with pytest.raises(NoUnitOfWork):
                _ = task.db

        await asyncio.to_thread(in_thread)

    shop.run(body)


def test_an_awaited_task_joins_the_unit_of_work_and_sees_its_own_request(
    shop: Shop, run_database: PostgreSQL, key: str
) -> None:
    async def inner(task: Any, key: str) -> Any:
        await add(task, key, "inner")
        return id(task.db)

    inner_task = shop.task(inner)

    async def outer(task: Any) -> None:
        own = task.request.id
        await add(task, key, "outer")
        assert await inner_task(key) == id(task.db)
        assert task.request.id == own
        raise KeyError

    with pytest.raises(KeyError):
        shop.run(outer)
    assert run_database.rows(key) == []
    asyncio.run(in_a_script(shop, inner_task, key))
    assert run_database.rows(key) == ["inner", "inner"]


async def in_a_script(shop: Shop, task: Any, key: str) -> None:
    """A unit of work of its own; then that of a block."""
    await task(key)
    async with shop.db.async_unit_of_work() as session:
        await task(key)
        assert len((await session.scalars(select(Row).where(Row.key == key))).all()) == 2
    await shop.db.async_engine.dispose()


def test_a_child_that_awaits_a_task_gives_it_a_unit_of_work(shop: Shop, run_database: PostgreSQL, key: str) -> None:
    async def inner(task: Any) -> None:
        await add(task, key)

    inner_task = shop.task(inner)

    async def outer(task: Any) -> None:
        await asyncio.gather(inner_task(), inner_task())
        raise KeyError

    with pytest.raises(KeyError):
        shop.run(outer)
    assert run_database.rows(key) == ["added", "added"]


def test_apply_in_a_coroutine_is_refused_and_in_a_task_has_its_own_unit_of_work(
    shop: Shop, run_database: PostgreSQL, key: str
) -> None:
    async def inner(task: Any) -> None:
        await add(task, key, "inner")

    inner_task = shop.task(inner)

    async def main() -> None:
        with pytest.raises(ConfigurationError, match=r"await .*to_thread"):
            inner_task.apply(throw=True)

    asyncio.run(main())

    async def outer(task: Any) -> None:
        await add(task, key, "outer")
        inner_task.apply(throw=True)

        async def child() -> None:
            inner_task.apply(throw=True)

        with pytest.raises(ConfigurationError, match=r"await .*to_thread"):
            await asyncio.create_task(child())
        raise KeyError

    with pytest.raises(KeyError):
        shop.run(outer)
    assert run_database.rows(key) == ["inner"]


def test_an_ordinary_unit_of_work_is_refused_in_coroutines_and_allowed_in_threads(
    shop: Shop, run_database: PostgreSQL, key: str
) -> None:
    """Each of its statements would stop the event loop. With a driver that is awaited the task's own coroutine may."""
    unit = shop.db.unit_of_work
    awaited = "asyncpg" in shop.app.conf.alchemy_database_url

    def opens() -> None:
        with unit() as session:
            session.add(Row(key=key, note="ordinary"))

    async def opens_here() -> None:
        opens()

    async def body(task: Any) -> None:
        with pytest.raises(CeleryAlchemyError, match=r"async with db.async_unit_of_work\(\).*to_thread"):
            await asyncio.create_task(opens_here())
        if awaited:
            opens()
        else:
            with pytest.raises(CeleryAlchemyError, match=r"async with db.async_unit_of_work\(\).*to_thread"):
                opens()
            await asyncio.to_thread(opens)

    shop.run(body)
    assert run_database.rows(key) == ["ordinary"]
    with pytest.raises(CeleryAlchemyError, match=r"async with db.async_unit_of_work\(\).*to_thread"):
        asyncio.run(opens_here())
    assert run_database.rows(key) == ["ordinary"]


def test_callbacks_of_both_kinds_run_after_the_commit(shop: Shop, run_database: PostgreSQL, key: str) -> None:
    seen: list[Any] = []

    async def callback() -> None:
        await asyncio.sleep(0)
        seen.append(("async def", run_database.rows(key)))
        shop.db.async_session.add(Row(key=key, note="in a callback"))

    async def body(task: Any) -> None:
        await add(task, key)
        shop.db.on_commit(callback)
        shop.db.on_commit(lambda: seen.append(("def", run_database.rows(key))))
        await task.db.commit()
        assert [kind for kind, _ in seen] == ["async def", "def"]

    shop.run(body)
    assert seen == [("async def", ["added"]), ("def", ["added", "in a callback"])]


def test_hooks_of_both_kinds_have_a_unit_of_work(shop: Shop, run_database: PostgreSQL, key: str) -> None:
    class Journal(AsyncDatabaseTask):
        abstract = True

        async def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
            assert self.request.id == task_id
            await add(self, key, "on_success")

        def after_return(self, *args: Any) -> None:
            self.db.add(Row(key=key, note="after_return"))

    async def body(task: Any) -> None:
        await add(task, key, "body")

    shop.task(body, base=Journal).apply(throw=True)
    assert run_database.rows(key) == ["body", "on_success", "after_return"]


def test_a_retry_is_rolled_back_before_it_is_sent(shop: Shop, run_database: PostgreSQL, key: str) -> None:
    seen: list[Any] = []

    async def body(task: Any) -> None:
        await add(task, key)
        try:
            task.retry(countdown=60)
        except Exception as error:
            seen.append((type(error), task.db.in_transaction()))
            raise

    task = shop.task(body)
    task.push_request(id=key, called_directly=False, is_eager=False, delivery_info={})
    try:
        with pytest.raises(Retry):
            task.run()
    finally:
        task.pop_request()
    assert seen == [(Retry, False)]
    assert run_database.rows(key) == []


def test_the_session_is_injected(shop: Shop) -> None:
    async def body(session: CurrentAsyncSession, number: int, *, other: Annotated[Any, UseDatabase()] = None) -> Any:
        assert other is session
        return await session.scalar(text(f"SELECT {number}"))

    task = shop.app.task(base=AsyncDatabaseTask, shared=False, name=uuid.uuid4().hex)(body)
    assert task.apply((7,), throw=True).result == 7
    with pytest.raises(TypeError):
        task.apply_async((1, 2))

    async def by_hand() -> None:
        session: Any = AsyncSession()
        session.scalar = lambda statement: asyncio.sleep(0, "by hand")
        assert await task(session, 7, other=session) == "by hand"

    asyncio.run(by_hand())


def test_db_task_makes_an_async_task_of_an_async_function(shop: Shop, run_database: PostgreSQL, key: str) -> None:
    @shop.db.task(name=f"bound-{key}")
    async def bound(self: AsyncDatabaseTask, session: CurrentAsyncSession, note: str) -> str:
        assert session is self.db
        session.add(Row(key=key, note=note))
        return note

    @shop.db.task
    async def plain(session: CurrentAsyncSession) -> int:
        return len((await session.scalars(select(Row).where(Row.key == key))).all())

    class House(AsyncDatabaseTask):
        abstract = True

    @shop.db.task(base=House, name=f"house-{key}")
    async def of_a_class_below(self: Any) -> str:
        return type(self).__mro__[1].__name__

    @shop.db.task(base=DatabaseTask, name=f"wrong-{key}")
    async def wrong() -> None: ...

    assert bound.apply(("ada",), throw=True).result == "ada"
    assert run_database.rows(key) == ["ada"]
    assert plain.apply(throw=True).result == 1
    assert of_a_class_below.apply(throw=True).result == "House"
    with pytest.raises(ConfigurationError, match="base=AsyncDatabaseTask"):
        _ = wrong.name
    with pytest.raises(TypeError):
        bound.apply_async(("ada", "lovelace"))


def test_the_other_kind_of_function_is_refused_where_it_is_defined(shop: Shop) -> None:
    async def coroutine(task: Any) -> None: ...

    def ordinary(task: Any) -> None: ...

    for body, base, other in (
        (coroutine, DatabaseTask, "AsyncDatabaseTask"),
        (ordinary, AsyncDatabaseTask, "Database"),
    ):
        task = shop.task(body, base=base)
        with pytest.raises(ConfigurationError, match=f"base={other}"):
            _ = task.name


async def with_session(session: CurrentSession | None) -> None: ...


async def with_other_database(session: "Annotated[Session, UseDatabase('reports')]") -> None: ...


def with_async_session(session: CurrentAsyncSession) -> None: ...


def with_other_async(*, other: "Annotated[AsyncSession, UseDatabase('reports')]") -> None: ...


@pytest.mark.parametrize(
    ("function", "base", "named"),
    [
        (with_session, AsyncDatabaseTask, ("CurrentAsyncSession", "base=DatabaseTask")),
        (with_other_database, AsyncDatabaseTask, ("AsyncSession", "base=DatabaseTask")),
        (with_async_session, DatabaseTask, ("CurrentSession", "base=AsyncDatabaseTask")),
        (with_other_async, DatabaseTask, ("CurrentSession", "base=AsyncDatabaseTask")),
    ],
)
def test_the_session_of_the_other_kind_is_refused_where_a_task_is_defined(
    function: Any, base: Any, named: tuple[str, ...]
) -> None:
    app = Celery("kinds", broker="memory://", set_as_current=False)
    app.task(base=base, name="wrong", shared=False)(function)
    with pytest.raises(ConfigurationError) as refused:
        app.finalize()
    assert all(name in str(refused.value) for name in ("wrong", *named)), refused.value


def test_a_session_for_type_checkers_alone_is_refused_in_both_spellings() -> None:
    """It would not be passed."""

    async def body(session: "Unknown[CurrentAsyncSession]") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    app = Celery("kinds", broker="memory://", set_as_current=False)
    app.task(base=AsyncDatabaseTask, name="wrong", shared=False)(body)
    with pytest.raises(ConfigurationError, match="cannot be evaluated"):
        app.finalize()


def test_what_ends_a_body_ends_no_event_loop(shop: Shop) -> None:
    async def leaves(task: Any) -> None:
        await task.db.execute(text("SELECT 1"))
        raise SystemExit(3)

    async def cancels_itself(task: Any) -> None:
        current = asyncio.current_task()
        assert current is not None
        current.cancel()
        await asyncio.sleep(0)

    async def goes_on(task: Any) -> Any:
        return await task.db.scalar(text("SELECT 1"))

    task = shop.task(leaves)
    with pytest.raises(SystemExit):
        task.apply(throw=True)
    with pytest.raises(BodyCancelled):
        shop.run(cancels_itself)
    assert shop.run(goes_on) == 1


def test_listeners_of_the_engine_see_the_unit_of_work_of_the_task(shop: Shop) -> None:
    seen: list[Any] = []

    @shop.db.on_engine
    def listen(engine: Any) -> None:
        event.listen(engine, "before_cursor_execute", lambda *_: seen.append(here().units[-1].request.id))

    async def body(task: Any) -> Any:
        await task.db.execute(text("SELECT 1"))
        await asyncio.sleep(0)
        await task.db.execute(text("SELECT 2"))
        return task.request.id

    assert seen == [shop.run(body)] * 2


def test_both_kinds_of_task_share_a_url(shop: Shop) -> None:
    def ordinary(task: Any) -> Any:
        return task.db.scalar(text("SELECT 1"))

    if "asyncpg" in shop.app.conf.alchemy_database_url:
        with pytest.raises(CeleryAlchemyError, match=r"event loop|async driver"):
            shop.task(ordinary, base=DatabaseTask).apply(throw=True)
    else:
        assert shop.task(ordinary, base=DatabaseTask).apply(throw=True).result == 1
        shop.db.stop()


def test_an_engine_of_ones_own_cannot_be_awaited(run_database: PostgreSQL) -> None:
    app = Celery("own", broker="memory://", set_as_current=False)
    Alchemy(app, engine=run_database.engine)

    async def body(task: Any) -> None:
        _ = task.db

    task = app.task(base=AsyncDatabaseTask, bind=True, shared=False, name="own")(body)
    with pytest.raises(ConfigurationError, match="alchemy_database_url"):
        task.apply(throw=True)
    app.close()
