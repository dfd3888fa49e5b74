"""Workers whose tasks are `async def` are killed at named points, with what comes next in the outbox: one certain
SIGKILL each. Nothing is sent again by hand."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from support import databases
from support.async_drivers import url_for
from support.exactly_once import settings_of
from support.once_kills import DUE, POINTS, Kills
from support.waiting import eventually
from support.worker import Site

SETUPS = {
    "prefork, asyncpg": ("prefork", "asyncpg", "redis"),
    "prefork, psycopg, alchemy://": ("prefork", "psycopg", "alchemy"),
    "asyncio, asyncmy, alchemy://": ("asyncio", "asyncmy", "alchemy"),
    "asyncio, psycopg": ("asyncio", "psycopg", "redis"),
    "threads, psycopg, alchemy://": ("threads", "psycopg", "alchemy"),
}
FULL = os.environ.get("CELERY_ALCHEMY_FAULTS") == "full"
WITHIN_S = 150.0
CERTAIN = {
    "chain": ("after COMMIT", "before publish", "before result"),
    "chord": ("after COMMIT", "before count", "after count"),
    "replace": ("before COMMIT", "after COMMIT"),
    "retry": ("before publish", "after publish"),
    "follow": ("after COMMIT",),
    "failing": ("before publish",),
    "failing chord": ("before count",),
}
LONG = [name for name in SETUPS if "prefork" not in name]
"""A worker that is one process starts anew after each kill: `make test-faults` has the time for it."""


@pytest.fixture(scope="module", params=[name for name in SETUPS if FULL or name not in LONG])
def kills(site: Site, request: pytest.FixtureRequest) -> Iterator[Kills]:
    pool, driver, results = SETUPS[request.param]
    name = "mariadb" if driver == "asyncmy" else "run_database"
    database: databases.Database = request.getfixturevalue(name)
    own: dict[str, Any] = {"result_backend": "alchemy://"} if results == "alchemy" else {}
    options = settings_of(driver, database)["alchemy_engine_options"]
    kills = Kills(
        site, database, pool, "", awaits=True, alchemy_exactly_once=True, alchemy_outbox=True,
        alchemy_outbox_resend_s=2, alchemy_outbox_attempts=100, task_acks_late=True, task_reject_on_worker_lost=True,
        alchemy_database_url=url_for(driver, database, "kills")[0], alchemy_engine_options=options, **own,
    )  # fmt: skip
    try:
        kills.start()
        yield kills
    finally:
        kills.stop()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", DUE)
def test_a_certain_kill(kills: Kills, kind: str) -> None:
    points = POINTS if FULL and kills.pool == "prefork" else CERTAIN[kind]
    for point in points:
        key, done = kills.run(kind, point, within_s=WITHIN_S, by_outbox=True)
        assert done, f"{kind} is lost {point}: {kills.traces(key)}\n{kills.tail()}"
        assert kills.traces(key) == sorted(DUE[kind]), point
    key, done = kills.run(kind, "no such point", within_s=WITHIN_S, by_outbox=True)
    assert done, kills.tail()
    odd = [line for line in kills.failures() if "ValueError" not in line]
    assert odd == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", DUE)
def test_the_broker_loses_everything(kills: Kills, kind: str) -> None:
    """Redis is emptied when a flow has begun, and twice later."""
    key, losses = kills.send(kind, by_outbox=True), 0

    def is_done() -> bool:
        nonlocal losses
        if losses < 3:
            losses += 1
            kills.lose_messages()
        kills.keep_up()
        return kills.is_done(key, kind)

    eventually(is_done, f"{kind} is done", within_s=WITHIN_S)
    assert kills.traces(key) == sorted(DUE[kind]), kills.tail()
