"""`async def` tasks, run here and now: their AsyncSession, their children, and what is refused with the remedy."""

import asyncio
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Annotated, Any

import pytest
from celery import Celery, current_task
from celery.exceptions import Retry
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from support.databases import PostgreSQL
from support.docs import DOCS, blocks
from support.project.models import Row

from celery_alchemy import (
    Alchemy,
    AsyncDatabaseTask,
    CeleryAlchemyError,
    ConfigurationError,
    CurrentAsyncSession,
    DatabaseTask,
    NoUnitOfWork,
    UseDatabase,
)
from celery_alchemy.strategies.asynchronous import loop_thread
from celery_alchemy.strategies.asynchronous.sessions import SharedSession
from celery_alchemy.strategies.scope import here
from celery_alchemy.workers.interruptions import BodyCancelled

Start = Callable[..., Any]


class Shop:
    """An app with a broker in memory and PostgreSQL."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.app.conf.update(alchemy_database_url=url, alchemy_engine_options={"pool_size": 2}, **settings)
        self.db = Alchemy(self.app)

    def run(self, body: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run `body` as a task that takes itself first; return its result or raise its error."""
        return self.task(body, **options).apply(args, throw=True).result

    def task(self, body: Callable[..., Any], base: Any = AsyncDatabaseTask, **options: Any) -> Any:
        return self.app.task(base=base, bind=True, shared=False, **{"name": uuid.uuid4().hex, **options})(body)


@pytest.fixture(params=["postgresql+psycopg", "postgresql+asyncpg"])
def shop(request: pytest.FixtureRequest, run_database: PostgreSQL) -> Iterator[Shop]:
    _, _, rest = run_database.url("async-tasks").partition("://")
    if "asyncpg" in request.param:
        rest = rest.partition("?")[0]  # the name of an application is another parameter there
    shop = Shop(f"{request.param}://{rest}")
    yield shop
    shop.db.coroutines.stop()
    shop.app.close()
    loop_thread.stop()


@pytest.fixture
def psycopg_shop(run_database: PostgreSQL) -> Iterator[Shop]:
    """For what is above the drivers, or needs one that serves ordinary tasks too."""
    shop = Shop(run_database.url("async-tasks"))
    yield shop
    shop.db.coroutines.stop()
    shop.app.close()
    loop_thread.stop()


async def add(task: Any, key: str, note: str = "added") -> None:
    task.db.add(Row(key=key, note=note))
    await task.db.flush()


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
        raise KeyError

    with pytest.raises(KeyError):
        shop.run(outer)
    assert run_database.rows(key) == ["inner"]


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


@pytest.mark.parametrize("mode", [True, "transaction"])
def test_a_task_that_only_reads_cannot_write(shop: Shop, run_database: PostgreSQL, key: str, mode: Any) -> None:
    async def body(task: Any) -> Any:
        found = await task.db.scalar(text("SELECT current_setting('transaction_read_only')"))
        with pytest.raises(DBAPIError, match="read-only"):
            await task.db.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, '')"), {"key": key})
        await task.db.rollback()
        return found

    assert shop.run(body, read_only=mode) == "on"
    assert run_database.rows(key) == []


def test_a_lost_conflict_runs_the_coroutine_again_and_the_pause_is_awaited(
    shop: Shop, run_database: PostgreSQL, key: str
) -> None:
    attempts: list[int] = []

    async def body(task: Any) -> int:
        attempts.append(len(attempts))
        await add(task, key, f"attempt {attempts[-1]}")
        if len(attempts) < 3:
            await task.db.execute(text("DO $$ BEGIN RAISE EXCEPTION 'of two' USING ERRCODE = '40001'; END $$"))
        return len(attempts)

    assert shop.run(body, isolation_retries=3) == 3
    assert run_database.rows(key) == ["attempt 2"]


def test_several_databases_are_one_unit_of_work(
    run_database: PostgreSQL, there: PostgreSQL, psycopg_shop: Shop, key: str
) -> None:
    shop = psycopg_shop
    shop.app.conf.alchemy_databases = {"there": there.url("async-tasks")}

    async def body(task: Any, fails: bool) -> None:
        await add(task, key)
        task.session_for("there").add(Row(key=key, note="there"))
        await task.session_for("there").flush()
        if fails:
            raise KeyError

    with pytest.raises(KeyError):
        shop.run(body, True)
    assert (run_database.rows(key), there.rows(key)) == ([], [])
    shop.run(body, False)
    assert (run_database.rows(key), there.rows(key)) == (["added"], ["there"])
    for db in shop.db.databases.values():
        db.coroutines.stop()


def test_a_test_in_one_transaction_is_not_left_by_a_coroutine(psycopg_shop: Shop) -> None:
    shop = psycopg_shop

    async def body(task: Any) -> Any:
        return await task.db.scalar(text("SELECT 1"))

    task = shop.task(body)
    assert task.apply(throw=True).result == 1
    with shop.db.one_transaction(), pytest.raises(ConfigurationError, match="one_transaction"):
        task.apply(throw=True)
    assert task.apply(throw=True).result == 1
    shop.db.stop()


def test_the_page_about_async_tasks(run_database: PostgreSQL, key: str) -> None:
    code = "\n".join(blocks((DOCS / "async.md").read_text(), "python")).replace("orders", "rows_")
    url = "postgresql+psycopg://localhost/shop"
    assert url in code
    page: dict[str, Any] = {"__name__": "shop"}
    exec(code.replace(url, run_database.url("async-page")).replace("redis://localhost", "memory://"), page)
    page["register"].apply((key,), throw=True)
    number = page["welcome"].apply((key,), throw=True).result
    assert number == f"Welcome, number {run_database.column('SELECT id FROM users WHERE name = :key', key=key)[0]}!"
    page["rename"].apply((key, f"{key}-renamed"), throw=True)
    assert page["count_both"].apply(throw=True).result[0] >= 1
    page["db"].stop()
    loop_thread.stop()


def test_children_and_threads_of_many_tasks_see_their_own_request(shop: Shop) -> None:
    variable: ContextVar[str] = ContextVar("variable")

    def look(task: Any, own: str) -> None:
        assert (task.request.id, current_task.request.id, variable.get()) == (own, own, own)

    async def child(task: Any, own: str) -> None:
        for _ in range(3):
            look(task, own)
            await asyncio.sleep(0)
        await asyncio.to_thread(look, task, own)

    async def body(task: Any) -> str:
        own = str(task.request.id)
        variable.set(own)
        session = task.db
        for _ in range(3):
            look(task, own)
            await asyncio.gather(child(task, own), child(task, own))
            assert await task.db.scalar(text("SELECT :own"), {"own": own}) == own
            assert task.db is session
        return own

    shop.app.conf.alchemy_engine_options = {"pool_size": 4, "max_overflow": 0, "pool_timeout": 60}
    task = shop.task(body)
    keys = [uuid.uuid4().hex for _ in range(40)]
    with ThreadPoolExecutor(10) as executor:
        found = list(executor.map(lambda key: task.apply(task_id=key, throw=True).result, keys))
    assert found == keys
