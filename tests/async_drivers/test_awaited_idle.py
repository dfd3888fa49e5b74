"""Connections that the server closed while they were idle cost no coroutine anything; a healthy one is not asked."""

import asyncio
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from support.async_drivers import Server, backend
from support.waiting import eventually

from celery_alchemy.strategies.engines.sizing import PoolSize


@pytest.fixture
def server(server: Server) -> Server:
    if server.is_sqlite:
        pytest.skip("SQLite has no server that could close anything")
    return server


async def connections(engine: AsyncEngine, count: int) -> list[int]:
    """Open so many connections, and give them back."""
    sessions = [AsyncSession(engine) for _ in range(count)]
    pids = [await backend(session) for session in map(Backend, sessions)]
    for session in sessions:
        await session.close()
    return pids


class Backend:
    def __init__(self, session: AsyncSession) -> None:
        self.execute, self.dialect = session.execute, session.get_bind().dialect


def kill(server: Server, pid: int) -> None:
    if server.url.get_backend_name() == "postgresql":
        server.database.execute("SELECT pg_terminate_backend(:pid)", pid=pid)
    else:
        server.database.execute(f"KILL {pid}")
    eventually(lambda: pid not in [c.pid for c in server.database.connections(server.name)], "it is gone")


@pytest.mark.parametrize("loop_runs", [True, False], ids=["the loop has noticed", "it has not"])
def test_all_idle_connections_may_die_at_once(server: Server, loop_runs: bool) -> None:
    async def body(engine: AsyncEngine) -> None:
        for _ in range(5):
            pids = await connections(engine, 3)
            for pid in pids:
                if loop_runs:
                    await asyncio.to_thread(kill, server, pid)
                else:
                    kill(server, pid)
            if loop_runs:
                # A server that is about to close a connection says so first. asyncpg reads that, and does not show it:
                # until the end of the connection comes, nobody can tell.
                await asyncio.sleep(0.2)
            assert not set(pids) & set(await connections(engine, 3))

    server.run(body)
    assert server.connects == 18
    assert server.errors == []


def test_a_healthy_connection_is_not_pinged(server: Server) -> None:
    pings: list[Any] = []

    async def body(engine: AsyncEngine) -> None:
        engine.sync_engine.dialect.do_ping = lambda connection: pings.append(connection) or True  # type: ignore[method-assign]
        first = await connections(engine, 1)
        for _ in range(10):
            await asyncio.sleep(0)
            assert await connections(engine, 1) == first

    server.run(body, PoolSize(1))
    assert not pings
