"""Soft time limits at random moments of the whole life of `async def` tasks."""

import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from support import databases
from support.async_drivers import url_for
from support.faults import SEED, amount
from support.worker import Site, Worker, running

pytestmark = pytest.mark.timeout(amount(180, 1800))
TASKS = amount(60, 2000)
ROWS = 8
WAVE = 40
"""Tasks at a time, for 8 connections."""


class Storm(NamedTuple):
    worker: Worker
    database: databases.Database
    driver: str


@pytest.fixture(scope="module", params=["asyncpg", "psycopg", "psycopg-along", "asyncmy", "aiomysql", "aiosqlite"])
def there(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, databases.Database]]:
    """A driver, and a database for it."""
    driver: str = request.param
    if driver == "aiosqlite":
        with databases.new_sqlite(tmp_path_factory.mktemp("storm") / "storm.sqlite") as sqlite:
            yield driver, sqlite
        return
    database = request.getfixturevalue("mariadb" if "my" in driver else "slow_commits")
    yield driver, database


@pytest.fixture(scope="module", params=["asyncio", "prefork"])
def storm(request: pytest.FixtureRequest, site: Site, there: tuple[str, databases.Database]) -> Iterator[Storm]:
    driver, database = there
    pool: str = request.param
    name = f"{site.prefix[:-1]}-storm-{pool}-{driver}"
    url, arguments = url_for(driver.removesuffix("-along"), database, name)
    options = {"connect_args": arguments} | ({"pool_size": 6, "max_overflow": 2} if pool == "asyncio" else {})
    settings = {"alchemy_engine_options": options, "worker_prefetch_multiplier": 4}
    settings["alchemy_begin_with_first_statement"] = driver.endswith("-along")
    with running(
        Worker(site, name, pool, database_url=url, modules=["storms"], settings=settings, awaits=True)
    ) as worker:
        yield Storm(worker, database, driver)
    databases.assert_no_connections(database, name)


def test_a_task_has_succeeded_exactly_when_its_rows_are_there(storm: Storm, key: str) -> None:
    """Nothing stays checked out, and nothing runs or is idle in a transaction on the server."""
    worker, database = storm.worker, storm.database
    chance = random.Random(SEED)
    slow = storm.driver in {"asyncpg", "psycopg", "psycopg-along"}
    warm = worker.call_together("live", [(f"{key}-warm", "warm", slow)] * WAVE)
    assert {outcome.state for outcome in warm} == {"SUCCESS"}
    longest_s = max(outcome.value for outcome in warm)  # of a life: limits strike anywhere in it, and after it

    outcomes = {}
    for first in range(0, TASKS, WAVE):
        ids = {}
        for note in map(str, range(first, min(first + WAVE, TASKS))):
            limit_s = round(chance.uniform(0.001, 1.1 * longest_s), 4)
            ids[note] = worker.send("live", key, note, slow, soft_time_limit=limit_s)
        outcomes |= {note: worker.wait(task_id, or_stored=True) for note, task_id in ids.items()}

    succeeded = {note for note, outcome in outcomes.items() if outcome.state == "SUCCESS"}
    counts = Counter(database.rows(key))
    reports = worker.probe()
    print(
        f"seed {SEED}, {storm.driver}, {worker.pool}: {len(succeeded)} of {TASKS} succeeded; limits in",
        dict(Counter((*re.findall(r"'(.*?)'", o.message), o.error)[0] for o in outcomes.values() if o.error)),
        f"connects {sum(report['connects'] for report in reports)}",
    )
    others = [one for one in outcomes.values() if one.error not in {"", "SoftTimeLimitExceeded"}]
    assert others == []
    assert 0 < len(succeeded) < TASKS, "the run is empty"
    assert set(counts.values()) == {ROWS}
    assert set(counts) == succeeded

    databases.assert_not_busy(database, worker.name)
    assert {report["checkedout"] for report in reports} == {0}
    assert sum(report["connects"] for report in reports) > 1, "no connection was ever discarded"
    after = worker.call_together("live", [(f"{key}-after", "after", slow)] * WAVE)
    assert {outcome.state for outcome in after} == {"SUCCESS"}
