"""`db.on_commit`, for every strategy under every worker pool.

A callback says [its name, the committed rows, the open transactions of its worker].
"""

import pytest
from support.databases import Database
from support.worker import Worker


def test_a_callback_runs_after_the_commit(worker: Worker, key: str) -> None:
    """The row is there for everyone, and the connection is not in a transaction any more."""
    assert worker.call("callback_after_commit", key).state == "SUCCESS"
    assert worker.said(key) == ["body ends", ["callback", ["row"], 0]]


def test_a_failing_task_drops_its_callbacks(worker: Worker, key: str) -> None:
    assert worker.call("callback_then_failure", key).error == "Boom"
    assert worker.said(key) == []


def test_a_rollback_by_hand_drops_the_callbacks_so_far(worker: Worker, key: str) -> None:
    assert worker.call("callback_then_rollback", key).state == "SUCCESS"
    assert worker.said(key) == [["kept", ["second transaction"], 0]]


def test_a_retry_drops_the_callbacks_of_the_attempt(worker: Worker, key: str) -> None:
    assert worker.call("callback_and_retry", key).state == "SUCCESS"
    assert worker.said(key) == [["attempt 1", ["row"], 0]]


def test_a_released_savepoint_keeps_its_callbacks_for_the_commit(worker: Worker, key: str) -> None:
    """Releasing a savepoint is not a commit."""
    assert worker.call("callback_in_savepoint", key, False).state == "SUCCESS"
    rows = ["outer", "savepoint"]
    assert worker.said(key) == ["body ends", ["outer", rows, 0], ["savepoint", rows, 0]]


def test_a_savepoint_rolled_back_drops_its_callbacks(worker: Worker, key: str) -> None:
    assert worker.call("callback_in_savepoint", key, True).state == "SUCCESS"
    assert worker.said(key) == ["body ends", ["outer", ["outer"], 0]]


@pytest.mark.parametrize("task", ["callback_without_transaction", "callback_after_select"])
def test_a_unit_that_wrote_nothing_runs_its_callbacks_at_its_end(worker: Worker, key: str, task: str) -> None:
    assert worker.call(task, key).state == "SUCCESS"
    assert worker.said(key) == ["body ends", ["callback", [], 0]]


def test_a_commit_by_hand_runs_the_callbacks_at_once(worker: Worker, key: str) -> None:
    assert worker.call("callback_and_explicit_commit", key).state == "SUCCESS"
    assert worker.said(key) == [["callback", ["row"], 0], "after self.db.commit()"]


def test_a_failing_callback_stops_neither_the_others_nor_the_task(worker: Worker, key: str, database: Database) -> None:
    assert worker.call("callback_fails", key).value == "done"
    assert worker.said(key) == [["first", ["row"], 0], ["third", ["row"], 0]]
    assert database.rows(key) == ["row"]
    assert "in a callback, on purpose" in worker.log()


def test_without_commit_on_success_callbacks_are_dropped_with_a_warning(worker: Worker, key: str) -> None:
    before = len(worker.warnings("callback_discarded"))
    assert worker.call("callback_discarded", key).state == "SUCCESS"
    assert worker.said(key) == []
    assert len(worker.warnings("callback_discarded")) == before + 1


def test_a_callback_belongs_to_the_unit_it_was_registered_in(worker: Worker, key: str) -> None:
    assert worker.call("callback_of_inner_unit", key).error == "Boom"
    inner, ended = worker.said(key)
    assert inner[:2] == ["inner", ["inner"]]
    assert ended == "inner unit ended"


def test_a_callback_may_open_a_unit_of_work(worker: Worker, key: str, database: Database) -> None:
    assert worker.call("callback_with_unit", key).state == "SUCCESS"
    assert database.rows(key) == ["task", "callback"]


def test_outside_any_unit_of_work_a_callback_runs_at_once(worker: Worker, key: str) -> None:
    assert worker.call("callback_outside", key).state == "SUCCESS"
    assert worker.said(key) == [["callback", [], 0], "body ends"]
