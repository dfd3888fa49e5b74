"""The five drivers for asyncio, each with an Engine of ours on a real server, without Celery."""

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from sqlalchemy import URL, Connection, event, make_url, text
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from celery_alchemy.strategies.engines.awaited_engines import AwaitedEngines
from celery_alchemy.strategies.engines.factory import EngineFactory
from celery_alchemy.strategies.engines.sizing import PoolSize
from celery_alchemy.strategies.features.choice import ENGINE_HOOKS
from celery_alchemy.strategies.options import DatabaseOptions
from celery_alchemy.strategies.registry import RunningScope
from support import databases

DRIVERS = ("asyncpg", "psycopg", "asyncmy", "aiomysql", "aiosqlite")
#: A statement that takes long, by the server's kind.
SLOW = {
    "postgresql": "SELECT pg_sleep(30)",
    "mysql": "SELECT SLEEP(30)",
    "sqlite": (
        "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 200000000) "
        "SELECT count(*) FROM numbers"
    ),
}
THREE = PoolSize(3)
Body = Callable[[AsyncEngine], Awaitable[Any]]


def url_for(driver: str, database: databases.Database, name: str) -> tuple[str, dict[str, Any]]:
    """Return the URL by which a worker called `name` reaches `database`, and the arguments for the driver."""
    url = make_url(database.url(name))
    query = {key: value for key, value in url.query.items() if key != "application_name" or driver == "psycopg"}
    url = url.set(drivername=f"{url.get_backend_name()}+{driver}", query=query)
    arguments = {"server_settings": {"application_name": name}} if driver == "asyncpg" else {}
    return url.render_as_string(hide_password=False), arguments


class Server:
    """A database and an Engine of ours that awaits one of the drivers."""

    def __init__(self, driver: str, database: databases.Database, name: str) -> None:
        self.driver, self.database, self.name = driver, database, name
        self.connects = 0
        self.port: int | None = None
        """In place of the server's."""
        self.serves_tasks = False
        """As in a worker: SQLite's write lock is taken when a transaction begins."""
        self.errors: list[BaseException] = []
        self.noises: list[dict[str, Any]] = []
        self.listeners: list[Callable[[Engine], object]] = []

    @property
    def url(self) -> URL:
        url = make_url(self.database.url(self.name))
        query = {
            key: value for key, value in url.query.items() if key != "application_name" or self.driver == "psycopg"
        }
        port = self.port or url.port
        return url.set(drivername=f"{url.get_backend_name()}+{self.driver}", query=query, port=port)

    @property
    def slow(self) -> str:
        return SLOW[self.url.get_backend_name()]

    @property
    def is_sqlite(self) -> bool:
        return self.driver == "aiosqlite"

    def factory(self, size: PoolSize, options: dict[str, Any]) -> EngineFactory:
        given = dict(options)
        more = {name: given.pop(name) for name in list(given) if name in DatabaseOptions.__dataclass_fields__}
        arguments = {"server_settings": {"application_name": self.name}} if self.driver == "asyncpg" else {}
        given["connect_args"] = {**arguments, **given.get("connect_args", {})}
        factory = EngineFactory(
            self.url, None, DatabaseOptions(engine_options=given, **more), RunningScope(), self._observe, ENGINE_HOOKS
        )
        factory.serves_tasks = self.serves_tasks
        factory.on_engine(self._count)
        for listener in self.listeners:
            factory.on_engine(listener)
        return factory

    def _observe(self, error: BaseException, connection: Connection | None) -> None:
        self.errors.append(error)

    def _count(self, engine: Engine) -> None:
        @event.listens_for(engine, "connect")
        def on_connect(*_: object) -> None:
            self.connects += 1

    def run(
        self,
        body: Body,
        size: PoolSize = THREE,
        within_s: float = 90,
        before: Coroutine[Any, Any, None] | None = None,
        **options: Any,
    ) -> Any:
        """Run a coroutine with the AsyncEngine of its loop; nothing is checked out at its end."""

        async def main() -> Any:
            if before is not None:
                await before
            engines = AwaitedEngines(self.factory(size, options), lambda: size)
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: self.noises.append(context))
            engine = engines.engine
            try:
                found = await asyncio.wait_for(body(engine), within_s)
                await settled(engine)
                return found
            finally:
                await engines.dispose()

        return asyncio.run(main())

    def busy(self) -> list[databases.ServerConnection]:
        return self.database.busy(self.name)


async def settled(engine: AsyncEngine) -> None:
    """Wait until nothing is checked out."""
    pool: Any = engine.pool
    for _ in range(1000):
        if pool.checkedout() == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still checked out: {pool.checkedout()}")


@types.coroutine
def struck(coroutine: Any, number: int, strike: Callable[[Any], None], counts: Callable[[], bool]) -> Any:
    """Await `coroutine`, and call `strike` with what it awaits as its `number`th of those that count; return the result
    of `coroutine`."""
    awaits, sent = 0, None
    error: BaseException | None = None
    while True:
        try:
            waits = coroutine.send(sent) if error is None else coroutine.throw(error)
        except StopIteration as stop:
            return stop.value
        finally:
            error = None
        if counts():
            awaits += 1
            if awaits == number:
                strike(waits)
        try:
            sent = yield waits
        except BaseException as raised:
            error, sent = raised, None


async def backend(connection: Any) -> int:
    """Return by what the server knows a connection."""
    sql = "SELECT pg_backend_pid()" if connection.dialect.name == "postgresql" else "SELECT CONNECTION_ID()"
    return int((await connection.execute(text(sql))).scalar_one())
