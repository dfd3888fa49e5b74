"""Several databases: one unit of work over all, under every worker pool."""

from collections.abc import Iterator

import pytest
from support import databases
from support.databases import PostgreSQL
from support.fleet import Fleet, fleet
from support.several import MODULES, settings
from support.waiting import eventually
from support.worker import Site, Worker

POOLS = {"prefork": 2, "threads": 3, "gevent": 4, "eventlet": 4, "solo": 1}


@pytest.fixture(scope="module")
def workers(site: Site, run_database: PostgreSQL, there: PostgreSQL, run_name: str) -> Iterator[Fleet]:
    """A worker of each worker pool."""
    with fleet(site, run_database, f"{run_name}-several", pools=POOLS, modules=MODULES, settings=settings(there)) as f:
        yield f
    databases.assert_no_connections(there, "reports")


@pytest.fixture(params=POOLS)
def worker(request: pytest.FixtureRequest, workers: Fleet) -> Worker:
    return next(worker for worker in workers.workers if worker.pool == request.param)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    used = [request.getfixturevalue(name) for name in ("worker", "there") if "worker" in request.fixturenames]
    yield
    if used:
        worker, there = used
        databases.assert_not_busy(there, "reports")
        eventually(lambda: {pool[2] for pool in worker.call("pools").value.values()} == {0}, "all is given back")


@pytest.mark.parametrize(
    ("ending", "state", "kept"),
    [
        ("returns", "SUCCESS", True),
        ("raises", "FAILURE", False),
        ("retry", "SUCCESS", False),
        ("ignored", "IGNORED", False),
        ("replaced", "IGNORED", True),
        ("flush fails here", "FAILURE", False),
        ("broken there", "FAILURE", False),
        ("commit fails there", "FAILURE", False),
    ],
)
def test_an_ending_is_of_both(
    worker: Worker, run_database: PostgreSQL, there: PostgreSQL, key: str, ending: str, state: str, kept: bool
) -> None:
    task_id = worker.send("end_both", key, ending)
    if ending == "replaced":
        assert worker.wait(task_id, ended="IGNORED")  # the attempt that was replaced
        assert worker.wait(task_id).value == [1, 1], "the replacement finds what was written before it was sent"
    elif ending == "ignored":
        assert worker.wait(task_id, ended="IGNORED")
    else:
        outcome = worker.wait(task_id)
        assert outcome.state == state, outcome
        if ending == "broken there":
            assert outcome.error == "BrokenTransaction"
            assert "on the database 'reports'" in outcome.message
    assert run_database.rows(key) == (["here"] if kept else [])
    assert there.rows(key) == (["there"] if kept else [])


def test_a_commit_that_fails_after_another_names_what_stays(
    worker: Worker, run_database: PostgreSQL, there: PostgreSQL, key: str
) -> None:
    """The order is documented: the default database comes last."""
    assert worker.call("end_both", key, "commit fails here").error == "IntegrityError"
    assert run_database.rows(key) == []
    assert there.rows(key) == ["there"]
    said = next(line for line in reversed(worker.log().splitlines()) if "in the COMMIT of default" in line)
    assert "after that of reports" in said
    assert "alchemy_two_phase = True" in said


def test_without_a_commit_neither_is_written(
    worker: Worker, run_database: PostgreSQL, there: PostgreSQL, key: str
) -> None:
    assert worker.call("commit_neither", key).state == "SUCCESS"
    assert (run_database.rows(key), there.rows(key)) == ([], [])
    warned = worker.warnings("commit_neither")
    assert any("on the database 'reports'" in line for line in warned)
    assert any("on the database" not in line for line in warned)


def test_a_task_that_only_reads_writes_neither(worker: Worker, there: PostgreSQL, key: str) -> None:
    outcome = worker.call("read_both", key)
    assert outcome.error == "ReadOnlyError", outcome
    assert there.rows(key) == []


def test_a_task_may_use_the_other_one_alone(
    worker: Worker, run_database: PostgreSQL, there: PostgreSQL, key: str
) -> None:
    assert worker.call("use_there_only", key).state == "SUCCESS"
    assert (run_database.rows(key), there.rows(key)) == ([], ["there"])


@pytest.mark.parametrize("fails", [False, True])
def test_callbacks_wait_for_the_commit_of_their_database(worker: Worker, key: str, fails: bool) -> None:
    """They run when all have committed; where one failed, those of what is committed."""
    assert worker.call("call_back_from_both", key, fails).state == ("FAILURE" if fails else "SUCCESS")
    assert worker.said(key) == ([["there", []]] if fails else [["there", ["here"]], ["here", ["here"]]])


def test_a_block_is_over_both_and_one_of_the_other_database_over_that(
    worker: Worker, run_database: PostgreSQL, there: PostgreSQL, key: str
) -> None:
    assert worker.call("open_blocks", key).state == "SUCCESS"
    assert run_database.rows(key) == ["task here"]
    assert sorted(there.rows(key)) == ["alone there", "task there"]


def test_tasks_that_take_both_in_different_orders_do_not_wait_for_one_another(
    worker: Worker, run_database: PostgreSQL, there: PostgreSQL, key: str
) -> None:
    """More tasks at one time than connections, under the green worker pools."""
    count = 12
    outcomes = worker.call_together("hold_both", [(key, ("here", "there")[number % 2]) for number in range(count)])
    assert [outcome.state for outcome in outcomes] == ["SUCCESS"] * count
    assert len(run_database.rows(key)) == len(there.rows(key)) == count


def test_a_soft_time_limit_rolls_both_back(
    run_database: PostgreSQL, there: PostgreSQL, workers: Fleet, key: str
) -> None:
    worker = workers.workers[0]
    assert worker.pool == "prefork"
    assert worker.call("limited_there", key).error == "SoftTimeLimitExceeded"
    assert (run_database.rows(key), there.rows(key)) == ([], [])
    databases.assert_not_busy(there, "reports")
