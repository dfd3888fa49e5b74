"""Deliveries of tasks with `exactly_once`: Celery's own tracer runs them, without a broker between."""

import functools
import inspect
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
from celery.app.trace import build_tracer
from sqlalchemy import text

from celery_alchemy import Alchemy, AsyncDatabaseTask, DatabaseTask
from celery_alchemy.strategies.asynchronous import loop_thread
from support.apps import make_app
from support.async_drivers import url_for
from support.databases import Database, new_sqlite

TABLE = "celery_alchemy_completed"


#: Where the tests of `def` tasks run: a driver, and whether BEGIN goes with the first statement.
PLACES = {
    "postgresql": ("psycopg", False),
    "psycopg-along": ("psycopg", True),
    "psycopg2-along": ("psycopg2", True),
    "mariadb": ("pymysql", False),
}
#: And those of `async def` tasks.
AWAITED_PLACES = {
    "await psycopg": ("psycopg", False),
    "await psycopg-along": ("psycopg", True),
    "await asyncpg": ("asyncpg", False),
    "await asyncmy": ("asyncmy", False),
    "await aiomysql": ("aiomysql", False),
    "await aiosqlite": ("aiosqlite", False),
}
AWAITED_SERVERS = [name for name in AWAITED_PLACES if "sqlite" not in name]
BOTH_SPELLINGS = [*PLACES, *AWAITED_SERVERS]
Place = tuple[Database, dict[str, Any]]


def fixture_of(places: Iterable[str]) -> Any:
    """Return the fixture `place` of tests that run in each of these: a database, and the settings of an app there."""

    @pytest.fixture(name="place", params=list(places))
    def place(request: pytest.FixtureRequest) -> Iterator[Place]:
        yield from place_of(request)

    return place


def place_of(request: pytest.FixtureRequest) -> Iterator[Place]:
    name = request.param
    if name in PLACES:
        driver, along = PLACES[name]
        database: Any = request.getfixturevalue("mariadb" if driver == "pymysql" else "run_database")
        url = database.url("once") if driver == "pymysql" else database.url("once", driver)
        yield database, {"alchemy_database_url": url} | (begins(along) if driver != "pymysql" else {})
        return
    driver, along = AWAITED_PLACES[name]
    if driver == "aiosqlite":
        with new_sqlite(request.getfixturevalue("tmp_path") / "once.sqlite3") as sqlite:
            yield sqlite, settings_of(driver, sqlite)
        return
    database = request.getfixturevalue("mariadb" if "mysql" in driver or "asyncmy" in driver else "run_database")
    yield database, settings_of(driver, database) | begins(along)


def begins(along: bool) -> dict[str, Any]:
    return {"alchemy_begin_with_first_statement": along}


def settings_of(driver: str, database: Database) -> dict[str, Any]:
    """Return the settings of an app whose tasks are `async def`."""
    url, arguments = url_for(driver, database, "once")
    options = {"connect_args": arguments} if driver == "aiosqlite" else {"connect_args": arguments, "pool_size": 4}
    return {"alchemy_database_url": url, "alchemy_engine_options": options, "spelling": "async def"}


async def done(value: Any) -> Any:
    """Return `value`, awaited where it is to be: a body written with it is that of both spellings."""
    return await value if inspect.isawaitable(value) else value


def as_function(body: Callable[..., Any]) -> Callable[..., Any]:
    """Return the coroutine function `body`, which awaits nothing but `done`, as an ordinary one."""

    @functools.wraps(body)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            body(*args, **kwargs).send(None)
        except StopIteration as stop:
            return stop.value
        raise AssertionError("it awaits")

    del call.__wrapped__  # type: ignore[attr-defined]
    return call


class Once:
    """An app whose tasks are delivered by hand, as often as a test wants.

    Args:
        spelling: Of its tasks: "def" or "async def".
    """

    def __init__(self, database: Database, spelling: str = "def", **changes: Any) -> None:
        self.database = database
        self.awaits = spelling == "async def"
        self.base: Any = AsyncDatabaseTask if self.awaits else DatabaseTask
        changes = {"alchemy_database_url": database.url("once"), "result_backend": "cache+memory://", **changes}
        self.app, self.db = make_app(None, changes=changes)
        assert isinstance(self.db, Alchemy)

    def task(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        """Make a task of a coroutine function that awaits nothing but `done`: one of this app's spelling."""

        def decorate(body: Callable[..., Any]) -> Any:
            return self.app.task(bind=True, **{"base": self.base, **options})(
                body if self.awaits else as_function(body)
            )

        return decorate

    def deliver(
        self, task: Any, *args: Any, task_id: str, redelivered: bool = False, **request: Any
    ) -> tuple[str, Any]:
        """Run `task` as a worker does; return its state and its result."""
        info = {"redelivered": redelivered, "priority": None}
        request = {"id": task_id, "task": task.name, "delivery_info": info, "is_eager": False, **request}
        tracer = build_tracer(task.name, task, app=self.app, propagate=False)
        retval, info_, *_ = tracer(task_id, args, request.pop("kwargs", {}), request)
        return (info_.state, info_.retval) if info_ is not None else ("SUCCESS", retval)

    def at_once(self, task: Any, *args: Any, task_id: str, copies: int = 2, **request: Any) -> Sequence[Any]:
        """Deliver copies at the same moment, each in a thread of its own."""
        self.app.finalize()
        task = self.app.tasks[task.name]  # Celery binds a task at its first use, which is not safe for threads
        return together([lambda: self.deliver(task, *args, task_id=task_id, **request)] * copies)

    def recorded(self, task_id: str) -> list[tuple[Any, ...]]:
        """Return the rows of a task: nesting, content type, result, note."""
        sql = f"SELECT nesting, content_type, result, note FROM {TABLE} WHERE task_id = :i ORDER BY nesting"
        with self.database.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(sql), {"i": task_id})]

    def close(self) -> None:
        self.db.stop()
        self.app.close()
        if self.awaits:
            loop_thread.stop()


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Call all at the same moment; return what they return, or raise."""
    barrier, found = threading.Barrier(len(calls)), [None] * len(calls)

    def call(number: int) -> None:
        barrier.wait(20)
        try:
            found[number] = calls[number]()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    errors = [one for one in found if isinstance(one, BaseException)]
    if errors:
        raise errors[0]
    return found


def new_id() -> str:
    return uuid.uuid4().hex
