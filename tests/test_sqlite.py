"""A SQLite file, for people trying it out with nothing installed: correct under every worker pool."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.databases import SQLite, new_sqlite
from support.worker import Site, Worker, running

# Collected again here, with the `worker` and the `database` below.
from test_contract_callbacks import test_a_callback_runs_after_the_commit  # noqa: F401
from test_contract_endings import (  # noqa: F401
    test_a_retry_is_published_after_rollback_and_release,
    test_a_swallowed_flush_error_fails_the_task,
    test_raising_rolls_back,
    test_replace_commits_before_the_replacement_is_published,
    test_returning_commits,
    test_rolling_back_in_the_except_block_makes_the_session_usable,
    test_the_commit_comes_before_the_next_task_of_a_chain_is_sent,
    test_the_recipe_works_unchanged,
    test_twenty_retries_leak_no_connection,
    test_without_commit_on_success_work_is_rolled_back_with_a_warning,
)
from test_contract_hooks import test_hooks_of_a_failure_are_committed_and_its_body_is_not  # noqa: F401
from test_contract_sessions import test_concurrent_increments_are_all_counted  # noqa: F401

INCREMENTS = 60


class OnSQLite(NamedTuple):
    pool: str

    def __str__(self) -> str:
        return self.pool


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SQLite]:
    with new_sqlite(tmp_path_factory.mktemp("sqlite") / "test.db") as database:
        yield database


@pytest.fixture(
    scope="module",
    params=[OnSQLite(pool) for pool in ("prefork", "threads", "gevent", "eventlet", "solo")],
    ids=str,
)
def worker(request: pytest.FixtureRequest, site: Site, database: SQLite) -> Iterator[Worker]:
    name = f"{site.prefix[:-1]}-sqlite-{request.param}"
    with running(Worker(site, name, request.param.pool, database_url=database.url(name), concurrency=4)) as worker:
        yield worker


def test_every_one_of_many_concurrent_increments_counts(worker: Worker, key: str, database: SQLite) -> None:
    """Read, modify, write, on one row: nothing is lost, and no task fails with "database is locked"."""
    database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=key)
    outcomes = worker.call_together("increment", [(key,)] * INCREMENTS)
    assert {outcome.error for outcome in outcomes} == {""}, outcomes
    assert sorted(outcome.value for outcome in outcomes) == list(range(1, INCREMENTS + 1))
    assert database.column("SELECT value FROM counters WHERE key_ = :key", key=key) == [INCREMENTS]


def test_the_file_survives_its_workers(site: Site, tmp_path: Path, key: str) -> None:
    """Two workers of different kinds at once on one file, then an integrity check."""
    with new_sqlite(tmp_path / "shared.db") as database:
        database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=key)
        names = [f"{site.prefix[:-1]}-sqlite-shared-{pool}" for pool in ("prefork", "threads")]
        first, second = (Worker(site, name, name.rpartition("-")[2], database_url=database.url(name)) for name in names)
        with running(first), running(second):
            ids = [(each, each.send("increment", key)) for _ in range(20) for each in (first, second)]
            outcomes = [each.wait(task_id) for each, task_id in ids]
        assert sorted(outcome.value for outcome in outcomes) == list(range(1, 41)), outcomes
        assert database.column("PRAGMA integrity_check") == ["ok"]
