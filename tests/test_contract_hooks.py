"""before_start, on_success, on_failure, on_retry and after_return that write rows, without saying commit."""

import pytest
from celery import VERSION as CELERY_VERSION
from support.databases import Database
from support.waiting import eventually
from support.worker import Worker


def test_hooks_of_a_success_are_committed(worker: Worker, key: str, database: Database) -> None:
    assert worker.call("journal", key, "success").state == "SUCCESS"
    assert database.rows(key) == ["before_start", "body 0", "on_success", "after_return"]


def test_hooks_of_a_failure_are_committed_and_its_body_is_not(worker: Worker, key: str, database: Database) -> None:
    assert worker.call("journal", key, "failure").error == "Boom"
    assert database.rows(key) == ["before_start", "on_failure", "after_return"]


def test_hooks_of_a_retry_are_committed(worker: Worker, key: str, database: Database) -> None:
    """The second attempt may run before the first one's on_retry."""
    assert worker.call("journal", key, "retry").state == "SUCCESS"
    expected = ["after_return", "before_start", "before_start", "body 1", "on_retry", "on_success"]
    eventually(lambda: sorted(database.rows(key)) == expected, f"{database.rows(key)} are {expected}")


def test_a_hook_that_fails_is_rolled_back_alone(worker: Worker, key: str, database: Database) -> None:
    """Celery before 5.7 makes a failure of the task of it, too late to undo anything."""
    worker.call("hook_fails", key)
    assert database.rows(key) == ["body"]


@pytest.mark.worker_pools("prefork")
@pytest.mark.skipif(CELERY_VERSION < (5, 7), reason="Celery before 5.7 runs no hook after a hard time limit")
def test_hooks_in_the_prefork_parent_are_committed(worker: Worker, key: str, database: Database) -> None:
    """After a hard limit; the parent keeps no connection of its own, for it forks again."""
    children = {report["pid"] for report in worker.probe()}
    assert worker.call("journal_hung", key).error == "TimeLimitExceeded"
    expected = {"before_start", "on_failure", "after_return"}
    eventually(lambda: set(database.rows(key)) == expected, "the hooks of the parent have written")
    for report in worker.probe():
        assert report["checkedout"] == 0
    assert len(children | {report["pid"] for report in worker.probe()}) == worker.concurrency + 1
