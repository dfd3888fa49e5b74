"""A soft time limit that comes while the task itself commits: it waits for the end of the COMMIT.

Where nothing comes after the COMMIT, the task has done what it is for. Where the task goes on, it is told of its limit.
"""

import os
import signal
import time
from collections.abc import Iterator

import pytest
from support import held_commits
from support.databases import PostgreSQL, assert_no_connections, assert_not_busy
from support.worker import Site, Worker, running

WAYS = (
    *("commit", "begin", "transaction", "get_transaction", "savepoint", "callback", "unit", "applied", "called"),
    *("of_session", "core", "closed", "core_commit", "own_session", "factory"),
)
CAUGHT_S = 0.3
"""A signal has long been seen by Python after this time."""


@pytest.fixture(scope="module")
def worker(site: Site, database: PostgreSQL) -> Iterator[Worker]:
    for statement in held_commits.STATEMENTS:
        database.execute(statement)
    name = f"{site.prefix[:-1]}-own-commits"
    modules = ("endings", "sessions", "own_commits")
    with running(Worker(site, name, "prefork", database_url=database.url(name), modules=modules)) as worker:
        yield worker
    assert_no_connections(database, name)


@pytest.mark.parametrize("goes_on", [False, True], ids=["returns", "goes on"])
@pytest.mark.parametrize("way", WAYS)
def test_a_limit_waits_for_a_commit_of_the_tasks_own(
    worker: Worker, database: PostgreSQL, key: str, way: str, goes_on: bool
) -> None:
    with held_commits.held_commits(database, key):
        task_id = worker.send("commit_held", key, way, goes_on)
        held_commits.wait_for_commit(database, worker.name)
        os.kill(worker.said(key)[0], signal.SIGUSR1)
        time.sleep(CAUGHT_S)
        assert database.rows(key) == []
    outcome = worker.wait(task_id)
    if goes_on and way != "savepoint":  # whose COMMIT is the last thing that it does
        assert (outcome.state, outcome.error) == ("FAILURE", "SoftTimeLimitExceeded"), outcome
    else:
        assert (outcome.state, outcome.value) == ("SUCCESS", "committed"), outcome
    assert database.rows(key) == ["committed"]
    assert worker.said(key) == (["on_commit"] if way == "callback" else [])
    assert worker.call("insert", key, "next").state == "SUCCESS", "the next task meets nothing of it"
    assert_not_busy(database, worker.name)
    assert {report["checkedout"] for report in worker.probe()} == {0}
