"""What the tests of alchemy_begin_with_first_statement look at."""

import asyncio
import contextlib
import inspect
import io
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, concurrency

from celery_alchemy import Alchemy, WorkerPool
from celery_alchemy.loadtests.services.proxy import CountingProxy
from support.apps import make_app

SETTING = "alchemy_begin_with_first_statement"
AWAITED = "await psycopg"
DRIVERS = ("psycopg", "psycopg2", AWAITED)
BEGIN, COMMIT = 1, 1
IN_TRANSACTION, FAILED, IDLE = 2, 3, 0  # libpq's numbers
Started = Callable[..., Any]


class OnLoop:
    """Calls functions in a greenlet of one event loop, where they can await."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def __call__(self, function: Callable[[], Any]) -> Any:
        return function() if concurrency.in_greenlet() else self._runner.run(concurrency.greenlet_spawn(function))

    def close(self) -> None:
        self._runner.close()


class Coroutines:
    """An Alchemy as coroutines see it; a Session inside an AsyncSession is that of its units of work."""

    def __init__(self, db: Alchemy) -> None:
        self.db = db

    @property
    def engine(self) -> Engine:
        return self.db.async_engine.sync_engine

    @property
    def strategy(self) -> Any:
        return self.db.coroutines.strategy

    @contextlib.contextmanager
    def unit_of_work(self, **options: Any) -> Iterator[Session]:
        block = self.db.async_unit_of_work(**options)
        session = await_only(block.__aenter__())
        try:
            yield session.sync_session
        except BaseException as error:
            await_only(block.__aexit__(type(error), error, error.__traceback__))
            raise
        await_only(block.__aexit__(None, None, None))

    def stop(self) -> None:
        self.db.stop()


def start_worker(url: str, mode: object, **changes: Any) -> Alchemy:
    _, db = make_app(url, changes={SETTING: mode, **changes})
    db.start_worker(WorkerPool(name="threads", concurrency=2))
    return db


def waited(value: Any) -> Any:
    """Return `value`, awaited where it is to be."""
    return await_only(value) if inspect.isawaitable(value) else value


def drivers_own(connection: Any) -> Any:
    """Return the connection itself, around which SQLAlchemy has put one of its own on an event loop."""
    return getattr(connection, "driver_connection", connection)


def trips(proxy: CountingProxy, work: Callable[[], object]) -> int:
    before = proxy.round_trips
    work()
    return proxy.round_trips - before


def status(session: Session) -> int:
    """What libpq knows of the transaction."""
    return int(session.connection().connection.dbapi_connection.info.transaction_status)  # type: ignore[union-attr]


def raw(session: Session) -> Any:
    return session.connection().connection.dbapi_connection


def server_says(session: Session, *names: str) -> list[str]:
    return [session.scalar(text(f"SELECT current_setting('{name}')")) or "" for name in names]


def unit(db: Any, work: Callable[[Session], object], **options: Any) -> None:
    with db.unit_of_work(**options) as session:
        work(session)


def copy_in(connection: Any, key: str) -> None:
    statement = "COPY rows_ (key_, note) FROM STDIN"
    own = drivers_own(connection)
    if own is not connection:
        await_only(_copy_in(own, statement, key))
        return
    with connection.cursor() as cursor:
        if hasattr(cursor, "copy_expert"):
            cursor.copy_expert(statement, io.StringIO(f"{key}\tcopied\n"))
        else:
            with cursor.copy(statement) as copy:
                copy.write_row((key, "copied"))


async def _copy_in(connection: Any, statement: str, key: str) -> None:
    async with connection.cursor() as cursor, cursor.copy(statement) as copy:
        await copy.write_row((key, "copied"))
