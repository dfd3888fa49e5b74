"""One AsyncEngine for each process and event loop, with the hooks and the options of the others."""

import asyncio
import os
import re
import traceback
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from support.async_drivers import Server

from celery_alchemy.strategies.drivers import awaited_urls
from celery_alchemy.strategies.engines.awaited_engines import AwaitedEngines
from celery_alchemy.strategies.engines.awaited_pool import AwaitedQueuePool
from celery_alchemy.strategies.engines.factory import EngineFactory
from celery_alchemy.strategies.engines.sizing import PoolSize, size_for
from celery_alchemy.strategies.errors import CeleryAlchemyError, InvalidSetting
from celery_alchemy.strategies.features.transaction_settings import TransactionSettings
from celery_alchemy.strategies.options import DatabaseOptions
from celery_alchemy.strategies.registry import RunningScope
from celery_alchemy.strategies.worker_pool import WorkerPool

ONE = text("SELECT 1")


async def select(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        assert (await connection.execute(ONE)).scalar_one() == 1


def test_each_loop_has_its_own(server: Server) -> None:
    engines = AwaitedEngines(server.factory(PoolSize(1), {}), lambda: PoolSize(1))

    async def main() -> AsyncEngine:
        engine = engines.engine
        assert engines.engine is engine
        await select(engine)
        await engines.dispose()
        assert engines.engine is engine  # who has it goes on with it
        return engine

    assert asyncio.run(main()) is not asyncio.run(main())
    assert engines.made() == []
    assert server.connects == 2


def test_without_a_loop_it_says_what_to_use(server: Server) -> None:
    engines = AwaitedEngines(server.factory(PoolSize(1), {}), lambda: PoolSize(1))
    with pytest.raises(CeleryAlchemyError, match=r"belongs to an event loop.*db\.(async_)?engine"):
        _ = engines.engine


def test_listeners_get_the_sync_engine_before_it_connects(server: Server) -> None:
    seen: list[Any] = []
    server.listeners.append(lambda engine: seen.append((engine, server.connects)))
    server.run(select)
    ((engine, connects),) = seen
    assert type(engine) is Engine
    assert engine.dialect.is_async
    assert connects == 0


def test_engine_options_apply(server: Server) -> None:
    async def body(engine: AsyncEngine) -> None:
        pool: Any = engine.pool
        assert isinstance(pool, AwaitedQueuePool)
        assert (pool.size(), pool.timeout(), pool.line.use_lifo) == (2, 7, True)
        await select(engine)

    server.run(body, PoolSize(2), pool_timeout=7, pool_use_lifo=True, pool_recycle=100)


def test_its_reader_refuses_to_write_and_keeps_its_connections(server: Server) -> None:
    engines = AwaitedEngines(server.factory(PoolSize(1), {}), lambda: PoolSize(1))

    async def main() -> None:
        reader = engines.reader
        assert engines.reader is reader
        for _ in range(5):
            await select(reader)
        with pytest.raises(SQLAlchemyError):
            async with reader.connect() as connection:
                await connection.execute(text("INSERT INTO rows_ (key_, note) VALUES ('k', 'n')"))
        await select(reader)
        await engines.dispose()

    asyncio.run(main())
    assert server.connects == 1
    assert server.database.rows("k") == []


def test_coroutines_queue_for_fewer_connections() -> None:
    postgresql, sqlite = make_url("postgresql+asyncpg://h/d"), make_url("sqlite+aiosqlite:///file")
    pool = WorkerPool(name="asyncio", concurrency=200)
    assert size_for(pool, postgresql, {}) == PoolSize(20, reserve=20)
    assert size_for(WorkerPool(name="asyncio", concurrency=4), postgresql, {}) == PoolSize(4, reserve=4)
    assert size_for(pool, postgresql, {"pool_size": 7, "max_overflow": 3}) == PoolSize(7, max_overflow=3)
    assert size_for(pool, sqlite, {}) == PoolSize(1, reserve=1)


def test_the_name_of_a_task_is_shown_for_its_transaction(server: Server) -> None:
    if server.url.get_backend_name() != "postgresql":
        pytest.skip("application_name is PostgreSQL's")

    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            unit: Any = SimpleNamespace(label="shop.create[1234]")
            hook = TransactionSettings(
                DatabaseOptions(application_name=True, external_pooler=True, statement_timeout_s=9)
            )
            hook.opened(unit, session.sync_session)
            assert (await session.execute(text("SHOW application_name"))).scalar_one() == "shop.create[1234]"
            assert (await session.execute(text("SHOW statement_timeout"))).scalar_one() == "9s"

    server.run(body)


def test_the_child_of_a_fork_drops_it_and_the_parent_goes_on(server: Server) -> None:
    engines = AwaitedEngines(server.factory(PoolSize(1), {}), lambda: PoolSize(1))

    async def insert(engine: AsyncEngine, note: str) -> None:
        async with AsyncSession(engine) as session:
            await session.execute(text("INSERT INTO rows_ (key_, note) VALUES (:k, :n)"), {"k": server.name, "n": note})
            await session.commit()

    async def child() -> None:
        await insert(engines.engine, "child")
        await engines.dispose()

    async def main() -> int:
        engine = engines.engine
        async with engine.connect() as busy:
            await busy.execute(text("INSERT INTO rows_ (key_, note) VALUES (:k, 'parent')"), {"k": server.name})
            if server.is_sqlite:
                await busy.commit()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    if engines.made() == []:
                        asyncio.run(child())
                        code = 0
                except BaseException:
                    traceback.print_exc()
                    raise
                finally:
                    os._exit(code)
            _, status = await asyncio.to_thread(os.waitpid, pid, 0)
            await busy.commit()
        await insert(engines.engine, "after")
        assert engines.engine is engine
        await engines.dispose()
        return os.waitstatus_to_exitcode(status)

    assert asyncio.run(asyncio.wait_for(main(), 60)) == 0
    assert sorted(server.database.rows(server.name)) == ["after", "child", "parent"]


@pytest.mark.parametrize(
    ("url", "instead"),
    [
        ("postgresql+psycopg2://h/d", "psycopg2 cannot be awaited; write postgresql+asyncpg or postgresql+psycopg."),
        ("mysql+pymysql://h/d", "pymysql cannot be awaited; write mysql+asyncmy or mysql+aiomysql."),
        ("mariadb+mysqldb://h/d", "mysqldb cannot be awaited; write mariadb+asyncmy or mariadb+aiomysql."),
        ("sqlite:///file", "pysqlite cannot be awaited; write sqlite+aiosqlite."),
    ],
)
def test_a_url_that_cannot_be_awaited_is_refused_with_the_one_to_write(url: str, instead: str) -> None:
    assert not awaited_urls.can_be_awaited(make_url(url))
    factory = EngineFactory(make_url(url), None, DatabaseOptions(), RunningScope(), lambda *_: None)
    with pytest.raises(InvalidSetting, match=re.escape(instead)):
        factory.awaited(PoolSize(1))


@pytest.mark.parametrize(
    ("url", "sync"),
    [
        ("postgresql+psycopg://h/d", "postgresql+psycopg://h/d"),
        ("postgresql+psycopg_async://h/d", "postgresql+psycopg://h/d"),
        ("postgresql+asyncpg://h/d", None),
        ("mysql+asyncmy://h/d", None),
        ("sqlite+aiosqlite:///file", None),
    ],
)
def test_one_url_may_serve_both_kinds_of_tasks(url: str, sync: str | None) -> None:
    found = make_url(url)
    assert awaited_urls.can_be_awaited(found)
    assert awaited_urls.has_sync_side(found) is (sync is not None)
    if sync is not None:
        assert awaited_urls.sync_url(found) == make_url(sync)
