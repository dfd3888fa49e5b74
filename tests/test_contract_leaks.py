"""A connection that a task keeps is taken back when its request ends, for every strategy and worker pool."""

import pytest
from support.databases import Database
from support.worker import Worker

LEAKS = 30
"""More than the connection pool of any pair has connections."""


def test_a_kept_connection_is_taken_back_and_its_place_named(worker: Worker, key: str, database: Database) -> None:
    """What it had not committed is gone; the task's own unit of work is committed."""
    assert worker.call("keep_connection", key).state == "SUCCESS"
    assert database.rows(key) == ["of the unit of work"]
    warning = worker.warnings("keep_connection")[-1]
    assert "keep_connection[" in warning
    assert "project/leaks.py:" in warning
    assert " in keep_connection: close it there" in warning


def test_a_kept_session_is_taken_back_whatever_the_ending(worker: Worker, key: str, database: Database) -> None:
    for fail, state in ((False, "SUCCESS"), (True, "FAILURE")):
        task_id = worker.send("keep_session", key, kwargs={"fail": fail})
        assert worker.wait(task_id).state == state
        assert any(f"keep_session[{task_id}]" in line for line in worker.warnings("keep_session"))
    assert database.rows(key) == []


def test_leaks_do_not_use_up_the_connection_pool(worker: Worker, key: str, database: Database) -> None:
    outcomes = worker.call_together("keep_connection", [(key,)] * LEAKS)
    assert {outcome.state for outcome in outcomes} == {"SUCCESS"}, outcomes
    assert database.rows(key) == ["of the unit of work"] * LEAKS


@pytest.mark.worker_pools("solo", "threads", "gevent", "eventlet")
def test_what_was_taken_back_cannot_be_used(worker: Worker, key: str, database: Database) -> None:
    """By the code that has kept it: the next task's connection is another one, and closing late harms nobody."""
    assert worker.call("keep_connection", key).state == "SUCCESS"
    assert worker.call("use_kept", key).value != "it still works"
    assert worker.call("forget_kept").value >= 1
    assert worker.call("keep_for_a_while", key).state == "SUCCESS"
    assert sorted(database.rows(key)) == ["done", "of the next task", "of the unit of work"]


def test_who_closes_in_time_hears_nothing(worker: Worker, key: str) -> None:
    assert worker.call("keep_for_a_while", key).state == "SUCCESS"
    assert worker.warnings("keep_for_a_while") == []
