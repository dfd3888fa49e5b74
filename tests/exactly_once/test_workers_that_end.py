"""A worker that ends deletes from the outbox what its tasks have ended: nothing of that is sent once more."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import Connection, Engine
from support import databases
from support.async_drivers import url_for
from support.exactly_once import AWAITED_SERVERS, fixture_of, settings_of
from support.once_flows import OUTBOX, Flows
from support.once_kills import DUE, Kills
from support.waiting import eventually
from support.worker import Site

from celery_alchemy.strategies.asynchronous import loop_thread
from celery_alchemy.workers.sending.received import received

AWAITING = [
    *(("asyncio", driver) for driver in ("asyncpg", "psycopg", "asyncmy", "aiomysql", "aiosqlite")),
    *(("prefork", "asyncpg"), ("threads", "asyncpg"), ("solo", "asyncmy"), ("prefork", "aiosqlite")),
]
ORDINARY = [(pool, "") for pool in ("prefork", "threads", "gevent", "eventlet", "solo")]
Make = Callable[[str, str], Kills]
place = fixture_of(AWAITED_SERVERS)


@pytest.fixture
def make(site: Site, request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[Make]:
    """Starts a worker that deletes nothing before its end; without a driver, of ordinary tasks."""
    with contextlib.ExitStack() as stack:

        def make(pool: str, driver: str, **more: Any) -> Kills:
            database: databases.Database
            if driver == "aiosqlite":
                database = stack.enter_context(databases.new_sqlite(tmp_path / "ends.sqlite3"))
            else:
                database = request.getfixturevalue("mariadb" if "my" in driver else "run_database")
            if driver:
                more["alchemy_database_url"] = url_for(driver, database, "kills")[0]
                more["alchemy_engine_options"] = settings_of(driver, database)["alchemy_engine_options"]
            database.execute(f"DELETE FROM {OUTBOX}")
            kills = Kills(
                site, database, pool, "", awaits=bool(driver), alchemy_exactly_once=True, alchemy_outbox=True,
                alchemy_outbox_resend_s=10_000, **{"pause_s": 2500, **more},
            )  # fmt: skip
            stack.callback(kills.stop)
            kills.start()
            return kills

        yield make


def in_transactions(database: databases.Database) -> Engine:
    return database.engine.execution_options(isolation_level="READ COMMITTED")


def lock(connection: Connection) -> None:
    """Let who wants to delete a row of the outbox wait."""
    assert connection.execute(text(f"SELECT id FROM {OUTBOX} FOR UPDATE")).all()


def left(kills: Kills) -> int:
    return int(kills.database.column(f"SELECT count(*) FROM {OUTBOX}")[0])


@pytest.mark.parametrize(("pool", "driver"), [*AWAITING, *ORDINARY])
def test_nothing_is_left(make: Make, pool: str, driver: str) -> None:
    kills = make(pool, driver)
    key = kills.send("chain", by_outbox=True)
    eventually(lambda: kills.said("succeeded in") == len(DUE["chain"]), "the chain has ended")
    assert left(kills) == len(DUE["chain"])
    assert kills.end(signal.SIGTERM) == 0
    assert left(kills) == 0, kills.tail()
    assert kills.traces(key) == sorted(DUE["chain"])


def test_what_is_under_way_when_the_event_loop_ends(make: Any) -> None:
    """The pool's event loop ends before the worker does, and what runs on it is cancelled: the worker looks again."""
    kills = make("asyncio", "asyncpg", pause_s=3)
    kills.send("follow", by_outbox=True)
    eventually(lambda: kills.said("succeeded in") == len(DUE["follow"]), "the flow has ended")
    with in_transactions(kills.database).connect() as other:
        lock(other)
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        eventually(lambda: kills.database.column(waits) != [0], "the worker waits for a row")
        kills._process.send_signal(signal.SIGTERM)
        eventually(lambda: kills.said("may be sent once more"), "it is cancelled")
        other.rollback()
    assert kills.end(signal.SIGTERM) == 0
    assert left(kills) == 0, kills.tail()


def test_what_is_under_way_is_waited_for(flows: Flows, key: str) -> None:
    """Where the event loop of a process ends with the worker, not before it."""
    flows.by_outbox(flows.step, None, key, "a")
    flows.work()
    found = received(flows.db)

    def end() -> None:
        flows.db.stop()
        loop_thread.stop()

    with in_transactions(flows.database).connect() as other:
        lock(other)
        threads = [threading.Thread(target=found.drop), threading.Thread(target=end)]
        threads[0].start()
        eventually(lambda: not found._keys, "it has begun")
        threads[1].start()
        threads[1].join(0.3)
        other.rollback()
    for thread in threads:
        thread.join(20)
    assert flows.outbox() == []
