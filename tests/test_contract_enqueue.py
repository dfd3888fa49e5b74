"""`delay_on_commit` and the Session as an argument, for every strategy under every worker pool.

A receiver says [what it was sent, the rows that everyone could see then].
"""

import pytest
from support.databases import Database
from support.waiting import eventually
from support.worker import Worker


def heard(worker: Worker, key: str, count: int) -> list[object]:
    """Return what was said, once there is as much of it as expected."""
    found: list[object] = []
    eventually(lambda: found.extend(worker.said(key)) or len(found) >= count, f"{count} things are said")
    return found


def test_it_is_sent_after_the_commit_under_the_id_that_was_returned(worker: Worker, key: str) -> None:
    outcome = worker.call("send_on_commit", key)
    assert heard(worker, key, 2) == ["body ends", ["sent", ["row"], outcome.value]]


@pytest.mark.parametrize("ending", ["raise", "rollback"])
def test_it_is_dropped_where_the_transaction_is_rolled_back(worker: Worker, key: str, ending: str) -> None:
    worker.call("send_on_commit", key, ending)
    worker.call("receive", key, "later")
    assert heard(worker, key, 2) == ["body ends", ["later", []]]


def test_a_retry_sends_what_its_last_attempt_asked_for(worker: Worker, key: str) -> None:
    task_id = worker.call("send_on_commit", key, "retry").value
    assert heard(worker, key, 3) == ["body ends", "body ends", ["sent", ["row"], task_id]]
    worker.call("receive", key, "later")
    assert heard(worker, key, 1) == [["later", ["row"]]], "the first attempt's message was to be dropped"


def test_a_savepoint_drops_only_what_was_sent_in_it(worker: Worker, key: str) -> None:
    worker.call("send_in_savepoint", key)
    worker.call("receive", key, "later")
    assert sorted(what for what, *_ in heard(worker, key, 3)) == ["kept", "later", "outer"]  # type: ignore[misc]


def test_the_arguments_are_those_of_the_call(worker: Worker, key: str) -> None:
    worker.call("send_what_changes", key)
    assert heard(worker, key, 1) == [["as it was"]]


def test_what_cannot_be_sent_fails_at_once(worker: Worker, key: str) -> None:
    assert worker.call("send_nonsense", key).value == ["TypeError", "EncodeError"]


def test_a_block_inside_a_task_has_a_commit_of_its_own(worker: Worker, key: str) -> None:
    worker.call("send_outside_and_inside", key)
    said = heard(worker, key, 2)
    assert "block ended" in said
    assert [one[:2] for one in said if isinstance(one, list)] == [["of the block", ["block"]]]


def test_a_task_may_say_that_it_waits_and_a_call_that_it_does_not(worker: Worker, key: str) -> None:
    worker.call("send_to_one_that_waits", key)
    assert heard(worker, key, 2) == ["body ends", ["received", ["row"]]]


def test_the_session_is_passed_and_may_be_called_for(worker: Worker, key: str, database: Database) -> None:
    assert worker.call("insert_by_argument", key, "given").value is True
    assert worker.call("call_one_with_an_argument", key).state == "SUCCESS"
    assert sorted(database.rows(key)) == ["called", "caller", "given"]
