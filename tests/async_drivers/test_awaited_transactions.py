"""What is known of a synchronous driver is known of its sibling on an event loop."""

import asyncio
import logging
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.util.concurrency import greenlet_spawn
from support.async_drivers import Server, backend

from celery_alchemy.strategies.engines.sizing import PoolSize
from celery_alchemy.strategies.engines.transient import is_conflict, is_transient
from celery_alchemy.strategies.errors import BrokenTransaction, TransientDatabaseError
from celery_alchemy.strategies.scope import living_scopes

ONE = PoolSize(1)


def count(server: Server, key: str) -> int:
    return len(server.database.rows(key))


async def insert(session: Any, key: str, note: str = "here") -> None:
    await session.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, :note)"), {"key": key, "note": note})


async def fail(session: Any, key: str) -> None:
    """Let a statement fail, and swallow it."""
    with pytest.raises(SQLAlchemyError):
        await session.execute(text("INSERT INTO no_such_table (key_) VALUES (:key)"), {"key": key})


def test_a_swallowed_error_is_not_committed_as_a_rollback(server: Server, key: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await insert(session, key)
            await fail(session, key)
            if server.url.get_backend_name() == "postgresql":
                with pytest.raises(BrokenTransaction):
                    await session.commit()
                await session.rollback()
                await insert(session, key)
            await session.commit()

    server.run(body, ONE)
    assert count(server, key) == 1


def test_a_savepoint_mends_it(server: Server, key: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await insert(session, key)
            savepoint = await session.begin_nested()
            await fail(session, key)
            await savepoint.rollback()
            await session.commit()

    server.run(body, ONE)
    assert count(server, key) == 1


@pytest.mark.parametrize("end", ["ROLLBACK", "COMMIT"])
def test_a_transaction_ended_by_a_text_is_not_committed_in_halves(server: Server, key: str, end: str) -> None:
    if end == "COMMIT" and server.url.get_backend_name() in {"mysql", "sqlite"}:
        pytest.skip("the same as with its synchronous siblings")

    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await insert(session, key, "before")
            connection = await session.connection()
            await connection.exec_driver_sql(end)
            await insert(session, key, "after")
            with pytest.raises(BrokenTransaction):
                await session.commit()

    server.run(body, ONE)
    assert server.database.rows(key) == ([] if end == "ROLLBACK" else ["before"])


def test_what_is_left_open_is_rolled_back_before_the_next_one(server: Server, key: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        def leave_open() -> None:
            connection = engine.sync_engine.raw_connection()
            cursor = connection.cursor()
            cursor.execute("BEGIN" if server.driver in {"aiosqlite", "asyncpg"} else "SELECT 1")
            cursor.execute(f"INSERT INTO rows_ (key_, note) VALUES ('{key}', 'left')")
            cursor.close()
            connection.close()

        await greenlet_spawn(leave_open)
        async with AsyncSession(engine) as session:
            await insert(session, key)
            await session.commit()

    server.run(body, ONE)
    assert server.database.rows(key) == ["here"]
    assert server.connects == 1


def test_an_isolation_level_for_one_transaction_keeps_the_connection(server: Server, key: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        for _ in range(3):
            async with engine.connect() as connection:
                level = "SERIALIZABLE"
                await connection.execution_options(isolation_level=level)
                assert await connection.get_isolation_level() == level
            async with engine.connect() as connection:
                assert await connection.get_isolation_level() == connection.default_isolation_level

    server.run(body, ONE)
    assert server.connects == 1


def test_what_code_has_set_on_the_driver_does_not_reach_the_next(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            raw = await connection.get_raw_connection()
            driver: Any = raw.driver_connection
            if server.driver == "psycopg":
                await driver.set_autocommit(True)
            elif server.driver == "asyncpg":
                raw.dbapi_connection.autocommit = True  # type: ignore[union-attr]
            elif server.is_sqlite:
                driver.row_factory = dict
            else:
                await driver.autocommit(True)
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    with caplog.at_level(logging.WARNING):
        server.run(body, ONE)
    assert server.connects == 2
    assert "has changed a connection that others use after it" in caplog.text


def test_a_deadlock_is_a_conflict_and_passes(server: Server, key: str) -> None:
    if server.is_sqlite:
        pytest.skip("one writes at a time")

    async def body(engine: AsyncEngine) -> list[Any]:
        for name in ("a", "b"):
            async with AsyncSession(engine) as session:
                await session.execute(text("INSERT INTO counters (key_, value) VALUES (:k, 0)"), {"k": key + name})
                await session.commit()
        met = asyncio.Barrier(2)

        async def one(*names: str) -> None:
            async with AsyncSession(engine) as session:
                for name in names:
                    update = text("UPDATE counters SET value = value + 1 WHERE key_ = :k")
                    await session.execute(update, {"k": key + name})
                    if name == names[0]:
                        await met.wait()
                await session.commit()

        return await asyncio.gather(one("a", "b"), one("b", "a"), return_exceptions=True)

    ended = server.run(body, PoolSize(2))
    (error,) = [one for one in ended if one is not None]
    assert isinstance(error, TransientDatabaseError)
    assert is_conflict(error)


def test_a_connection_lost_in_a_statement_passes(server: Server) -> None:
    if server.is_sqlite:
        pytest.skip("SQLite has no server that could close anything")

    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            pid = await backend(await session.connection())
            slow = asyncio.ensure_future(session.execute(text(server.slow)))
            await asyncio.sleep(0.1)
            kill = "SELECT pg_terminate_backend(:pid)" if "postgresql" in server.url.drivername else "KILL :pid"
            await asyncio.to_thread(server.database.execute, kill, pid=pid)
            with pytest.raises(TransientDatabaseError):
                await slow
            await session.rollback()
            assert (await session.execute(text("SELECT 1"))).scalar_one() == 1

    server.run(body, ONE)


def test_a_refused_connection_passes(server: Server) -> None:
    if server.is_sqlite:
        pytest.skip("SQLite has no server that could refuse")

    async def body(engine: AsyncEngine) -> None:
        with pytest.raises(SQLAlchemyError) as caught:
            async with engine.connect():
                pass
        assert isinstance(caught.value, TransientDatabaseError)
        assert is_transient(caught.value)

    server.port = 1
    server.run(body, ONE)


def test_the_statement_timeout_is_set(server: Server) -> None:
    if server.is_sqlite:
        pytest.skip("SQLite stops no statement")

    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            with pytest.raises(SQLAlchemyError):
                await session.execute(text("SELECT pg_sleep(20)" if "postgres" in server.url.drivername else SLOW_ROWS))
            await session.rollback()

    server.run(body, ONE, within_s=15, statement_timeout_s=0.3)


#: SLEEP() of MariaDB returns 1 when it is stopped.
SLOW_ROWS = "SELECT COUNT(*) FROM seq_1_to_1000000 a, seq_1_to_1000000 b WHERE a.seq + b.seq = 3"


def test_what_a_listener_has_begun_on_a_new_connection_stays(server: Server) -> None:
    if server.url.get_backend_name() != "postgresql":
        pytest.skip("a setting that a ROLLBACK takes back is PostgreSQL's")

    def on_engine(engine: Any) -> None:
        @event.listens_for(engine, "connect")
        def on_connect(dbapi_connection: Any, record: object) -> None:
            cursor = dbapi_connection.cursor()
            cursor.execute("SET search_path TO pg_catalog")
            cursor.close()

    server.listeners.append(on_engine)

    async def body(engine: AsyncEngine) -> None:
        for _ in range(3):
            async with engine.connect() as connection:
                found = (await connection.execute(text("SHOW search_path"))).scalar_one()
                assert found == "pg_catalog"
                await connection.rollback()

    server.run(body, ONE)


def test_nothing_is_held_afterwards(server: Server) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await session.execute(text("SELECT 1"))
            assert sum(len(scope.held) for scope in living_scopes()) == 1

    server.run(body, ONE)
    assert not [scope for scope in living_scopes() if scope.held]
