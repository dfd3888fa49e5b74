"""Workers whose tasks are coroutines, under each worker pool that is made for them."""

from collections.abc import Iterator
from typing import Any

import pytest
from support import databases
from support.worker import Site, Worker, running

SLOW_COMMIT = (
    "CREATE TABLE IF NOT EXISTS slow_ (key_ text)",
    "CREATE OR REPLACE FUNCTION nap_() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    "PERFORM pg_sleep(CASE WHEN NEW.key_ LIKE 'storm %' THEN 0.01 ELSE 1 END); RETURN NULL; END $$",
    "DROP TRIGGER IF EXISTS nap ON slow_",
    "CREATE CONSTRAINT TRIGGER nap AFTER INSERT ON slow_ DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
    "EXECUTE FUNCTION nap_()",
)
"""A row in this table makes the COMMIT take a second."""


@pytest.fixture(scope="session")
def few_connections() -> dict[str, Any]:
    """Engine options for eight of them in a process."""
    return {"pool_size": 6, "max_overflow": 2, "pool_timeout": 20}


@pytest.fixture(scope="session")
def slow_commits(run_database: databases.PostgreSQL) -> databases.PostgreSQL:
    for statement in SLOW_COMMIT:
        run_database.execute(statement)
    return run_database


@pytest.fixture(scope="module", params=["asyncio", "prefork"])
def trials(
    request: pytest.FixtureRequest, site: Site, slow_commits: databases.PostgreSQL, few_connections: dict[str, Any]
) -> Iterator[Worker]:
    """A worker for the tasks of `trials`."""
    name = f"{site.prefix[:-1]}-trials-{request.param}"
    settings = {"alchemy_engine_options": few_connections, "worker_prefetch_multiplier": 4}
    with running(
        Worker(
            site, name, request.param, database_url=slow_commits.url(name), modules=["trials", "ends"], awaits=True,
            settings=settings, concurrency={"asyncio": 200, "prefork": 2}[request.param],
        )
    ) as worker:  # fmt: skip
        yield worker
    databases.assert_no_connections(slow_commits, name)


@pytest.fixture
def unharmed(trials: Worker, slow_commits: databases.PostgreSQL) -> Iterator[Worker]:
    """The worker; after the test nothing of it is checked out, running or idle in a transaction."""
    yield trials
    databases.assert_not_busy(slow_commits, trials.name)
    assert {report["checkedout"] for report in trials.probe()} == {0}
