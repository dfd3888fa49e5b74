"""A server that answers no more, and does not close: who is cancelled does not wait for it for ever."""

import asyncio
import contextlib

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from support.async_drivers import Server

from celery_alchemy.strategies.engines.sizing import PoolSize

WITHIN_S = 45


class Between:
    """Passes on what client and server say, until it is silent; new connections are accepted, and not answered."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.silent = False
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        if self.silent:
            return
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        for one, other in ((reader, back), (there, writer)):
            self._tasks.add(asyncio.create_task(self._pass_on(one, other)))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(65536):
                    if not self.silent:
                        writer.write(data)
        finally:
            writer.close()

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def test_who_is_cancelled_in_a_statement_lets_go(server: Server) -> None:
    if server.is_sqlite:
        pytest.skip("SQLite has no server")
    between = Between(server.url.port or 0)

    async def body(engine: AsyncEngine) -> None:
        begun = asyncio.Event()

        async def one() -> None:
            async with AsyncSession(engine) as session:
                await session.execute(text("SELECT 1"))
                begun.set()
                await session.execute(text(server.slow))

        task = asyncio.create_task(one())
        await begun.wait()
        await asyncio.sleep(0.1)
        between.silent = True
        await asyncio.sleep(0.3)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=WITHIN_S)
        assert done, "it still waits"
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        await between.stop()

    async def prepare() -> None:
        server.port = await between.start()

    server.run(body, PoolSize(1), before=prepare())
