"""A time limit at every single `await` of a task, one after the other, before, while and after what is awaited."""

import asyncio
import contextlib
import gc
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from support import databases
from support.async_drivers import DRIVERS, struck, url_for
from support.async_shop import Shop
from support.project.models import Row

from celery_alchemy.strategies.asynchronous import loop_thread
from celery_alchemy.strategies.asynchronous.hosting import Interruption, Killed, drive
from celery_alchemy.strategies.drivers.base import driver_of

# psycopg says so of a stream that is discarded with its connection.
pytestmark = pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
MOST = 400
"""Awaits of one task; more than that would be a loop without an end."""


class There(NamedTuple):
    shop: Shop
    database: databases.Database
    name: str


@pytest.fixture(params=[*DRIVERS, "psycopg-along"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[There]:
    driver, _, along = request.param.partition("-")
    name = f"awaits-{driver}-{uuid.uuid4().hex[:6]}"
    if driver == "aiosqlite":
        with databases.new_sqlite(tmp_path / "awaits.sqlite3") as sqlite:
            yield from opened(driver, sqlite, name)
        return
    database = request.getfixturevalue("mariadb" if "my" in driver else "run_database")
    yield from opened(driver, database, name, begins_along=bool(along))


def opened(driver: str, database: databases.Database, name: str, *, begins_along: bool = False) -> Iterator[There]:
    url, arguments = url_for(driver, database, name)
    shop = Shop(url)
    shop.app.conf.alchemy_begin_with_first_statement = begins_along
    shop.app.conf.alchemy_engine_options = {"pool_size": 2, "connect_args": arguments}
    shop.db.on_engine(lambda engine: driver_of(engine.dialect).serve_tasks(engine))  # as in a worker
    yield There(shop, database, name)
    gc.collect()
    shop.db.coroutines.stop()
    shop.app.close()
    loop_thread.stop()
    databases.assert_no_connections(database, name)


class Strike:
    """A time limit at the `number`th await.

    Args:
        kills: A hard one, anywhere in the life of a task; otherwise a soft one, in its body.
        how: "before" what is awaited has had its turn, "while" it is under way or has been done unnoticed, or "after"
            it, when it was told.
    """

    def __init__(self, number: int, how: str, *, kills: bool = False) -> None:
        self.number, self.how, self.kills = number, how, kills
        self.struck = False
        self.in_commit = False

    def drive(self, function: Callable[[], Any], interruption: Interruption) -> Any:
        def strike(waits: Any) -> None:
            self._strike(waits, interruption)

        return struck(drive(function, interruption), self.number, strike, lambda: interruption.in_body or self.kills)

    def _strike(self, waits: Any, interruption: Interruption) -> None:
        self.struck = True

        def strike(*_: object) -> None:
            self.in_commit = interruption._held > 0
            if self.kills:
                interruption.kill()
            else:
                interruption.soft(1.0)

        if self.how == "before" or waits is None:
            strike()
        elif self.how == "after":
            waits.add_done_callback(strike)
        else:
            asyncio.get_running_loop().call_soon(self._when_done_in_threads, strike)

    def _when_done_in_threads(self, strike: Callable[[], None]) -> None:
        """aiosqlite: its threads are through with what they have, and the loop does not know it yet."""
        for thread in threading.enumerate():
            arguments = getattr(thread, "_args", ())
            if "_connection_worker_thread" in thread.name and arguments:
                through = threading.Event()
                arguments[0].put_nowait((None, through.set))
                assert through.wait(30)
        strike()


async def live(task: Any, key: str, note: str) -> None:
    session = task.db
    await session.execute(text("SELECT 1 AS number UNION ALL SELECT 2 UNION ALL SELECT 3"))
    session.add_all(Row(key=key, note=note) for _ in range(3))
    await session.flush()
    assert len((await session.scalars(select(Row).where(Row.key == key, Row.note == note))).all()) == 3
    await session.rollback()
    session.add_all(Row(key=key, note=note) for _ in range(2))
    await session.flush()
    with contextlib.suppress(DBAPIError):
        async with session.begin_nested():
            await session.execute(text("SELECT nothing FROM nowhere"))
    async with session.begin_nested():
        session.add(Row(key=key, note=note))
    async for _ in await session.stream(select(Row).where(Row.key == key, Row.note == note)):
        await asyncio.sleep(0)
    await session.scalars(select(Row).where(Row.key == key, Row.note == note))


@pytest.mark.parametrize("how", ["before", "while", "after"])
def test_a_soft_limit_reaches_the_task_and_leaves_nothing(
    there: There, key: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No code of ours, of SQLAlchemy's or the driver's keeps it to itself; locks are free at once, though the error is
    kept; the next task is none the worse."""
    task = there.shop.task(live)
    kept, swallowed = [], []
    for number in range(1, MOST):
        strike = Strike(number, how)
        monkeypatch.setattr(loop_thread, "drive", strike.drive)
        note = f"{how} {number}"
        try:
            task.apply((key, note), throw=True)
        except SoftTimeLimitExceeded as error:
            kept.append(error)
            assert there.database.rows(key) == [], f"of the task that was struck at {number} a row is there"
        else:
            if not strike.struck:
                break
            if not strike.in_commit:
                swallowed.append(number)
            assert len(there.database.rows(key)) == 3
            there.database.execute("DELETE FROM rows_ WHERE key_ = :key", key=key)
        assert_free(there)
        monkeypatch.setattr(loop_thread, "drive", drive)
        task.apply((f"{key}-next", note), throw=True)
    else:
        pytest.fail("the task has no end")
    print(f"{len(kept)} awaits were struck")
    assert len(kept) > 10
    assert swallowed == []


@pytest.mark.parametrize("how", ["before", "while", "after"])
def test_a_kill_leaves_nothing(there: There, key: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first `await` of the task to the last one of its end."""
    task = there.shop.task(live)
    kept = []
    for number in range(1, MOST):
        strike = Strike(number, how, kills=True)
        monkeypatch.setattr(loop_thread, "drive", strike.drive)
        try:
            task.apply((key, f"{how} {number}"), throw=True)
        except Killed as error:
            kept.append(error)
        if not strike.struck:
            break
        assert len(there.database.rows(key)) in {0, 3}
        there.database.execute("DELETE FROM rows_ WHERE key_ = :key", key=key)
        assert_free(there)
        monkeypatch.setattr(loop_thread, "drive", drive)
        task.apply((f"{key}-next", f"{how} {number}"), throw=True)
    else:
        pytest.fail("the task has no end")
    print(f"{len(kept)} awaits were struck")
    assert len(kept) > 10


def assert_free(there: There) -> None:
    """Nothing is checked out or runs, no transaction is open, and another may write."""
    pools = [engine.pool for engine in there.shop.db.coroutines.strategy.engines_made()]
    assert [pool.checkedout() for pool in pools] == [0]  # type: ignore[attr-defined]
    if not isinstance(there.database, databases.SQLite):
        databases.assert_not_busy(there.database, there.name)
        return
    other = sqlite3.connect(str(there.database.engine.url.database), isolation_level=None, timeout=2)
    other.execute("BEGIN IMMEDIATE")
    other.execute("INSERT INTO rows_ (key_, note) VALUES ('another', 'writer')")
    other.execute("COMMIT")
    other.close()
