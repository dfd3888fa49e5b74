"""How each ending of a task treats its transaction, for every strategy under every worker pool."""

import pytest
from support.databases import Database
from support.waiting import eventually
from support.worker import Worker


def test_the_recipe_works_unchanged(worker: Worker, key: str, database: Database) -> None:
    """`self.db.add(...)`, `self.db.commit()`, nothing else."""
    assert worker.call("create", key).state == "SUCCESS"
    assert database.column("SELECT name FROM users WHERE name = :key", key=key) == [key]


def test_returning_commits(worker: Worker, key: str, database: Database) -> None:
    assert worker.call("insert", key).state == "SUCCESS"
    assert database.rows(key) == ["inserted"]


def test_the_commit_comes_before_the_next_task_of_a_chain_is_sent(
    worker: Worker, watched_key: str, database: Database
) -> None:
    ids = worker.send_chain(worker.signature("insert", watched_key), worker.signature("read", watched_key))
    assert worker.wait(ids[-1]).value == ["inserted"]
    assert worker.said(watched_key) == [{"task": "read", "rows": ["inserted"], "open": 0}]


def test_the_commit_comes_before_links_are_sent(worker: Worker, watched_key: str) -> None:
    link = worker.signature("read", watched_key).set(task_id=f"link-{watched_key}")
    worker.send("insert", watched_key, link=[link])
    assert worker.wait(f"link-{watched_key}").value == ["inserted"]
    assert worker.said(watched_key) == [{"task": "read", "rows": ["inserted"], "open": 0}]


def test_the_commits_come_before_the_body_of_a_chord_is_sent(worker: Worker, watched_key: str) -> None:
    body = worker.call("start_chord", watched_key).value
    assert sorted(worker.wait(body).value) == ["first", "second"]
    sent = [said for said in worker.said(watched_key) if said["task"] == "read"]
    assert [sorted(said["rows"]) for said in sent] == [["first", "second"]]


def test_an_error_callback_is_a_unit_of_work(worker: Worker, key: str, database: Database) -> None:
    worker.call("fail", key, link_error=[worker.signature("note_error", immutable=False)])
    assert database.rows(key) == ["errback Boom"]


@pytest.mark.worker_pools("prefork")
def test_an_error_callback_in_the_prefork_parent_is_one_too(worker: Worker, key: str, database: Database) -> None:
    """After a hard time limit; the parent keeps no connection."""
    error_callback = worker.signature("note_error", immutable=False)
    worker.call("fail_slowly", key, time_limit=1, link_error=[error_callback])
    eventually(lambda: set(database.rows(key)) == {"errback TimeLimitExceeded"}, "the error callback ran")
    eventually(lambda: len(database.connections(worker.name)) <= worker.concurrency, "the killed process is gone")


def test_signal_handlers_write_in_a_unit_of_work(worker: Worker, database: Database, key: str) -> None:
    assert worker.call("fail", f"signalled-{key}").error == "Boom"
    assert database.rows(f"signalled-{key}") == ["task_prerun", "task_postrun"]


@pytest.mark.parametrize(
    ("task", "rows"),
    [("begin_by_hand", ["begun by hand", "begun again"]), ("close_by_hand", ["committed by hand"])],
)
def test_transactions_by_hand_work_as_sqlalchemy_says(
    worker: Worker, key: str, database: Database, task: str, rows: list[str]
) -> None:
    assert worker.call(task, key).state == "SUCCESS"
    assert database.rows(key) == rows


def test_raising_rolls_back(worker: Worker, key: str, database: Database) -> None:
    outcome = worker.call("fail", key)
    assert (outcome.state, outcome.error) == ("FAILURE", "Boom")
    assert database.rows(key) == []


@pytest.mark.parametrize("task", ["discard_flush", "discard_core", "discard_text", "discard_pending"])
def test_without_commit_on_success_work_is_rolled_back_with_a_warning(
    worker: Worker, key: str, database: Database, task: str
) -> None:
    before = len(worker.warnings(task))
    assert worker.call(task, key).state == "SUCCESS"
    assert database.rows(key) == []
    assert len(worker.warnings(task)) == before + 1


def test_without_commit_on_success_reading_is_no_reason_to_warn(worker: Worker, key: str) -> None:
    assert worker.call("discard_nothing", key).value == 0
    assert worker.warnings("discard_nothing") == []


def test_without_commit_on_success_a_commit_by_hand_counts(worker: Worker, key: str, database: Database) -> None:
    assert worker.call("commit_by_hand", key).state == "SUCCESS"
    assert database.rows(key) == ["by hand"]
    assert worker.warnings("commit_by_hand") == []


def test_a_swallowed_flush_error_fails_the_task(worker: Worker, key: str, taken: str, database: Database) -> None:
    """The error names the remedy and is chained to the one that was swallowed."""
    outcome = worker.call("swallow_flush_error", key, taken)
    assert outcome.state == "FAILURE"
    assert "self.db.rollback()" in outcome.message
    assert "UniqueViolation" in outcome.traceback or "IntegrityError" in outcome.traceback
    assert database.rows(key) == []


def test_rolling_back_in_the_except_block_makes_the_session_usable(
    worker: Worker, key: str, taken: str, database: Database
) -> None:
    assert worker.call("swallow_and_roll_back", key, taken).state == "SUCCESS"
    assert database.rows(key) == ["after rollback"]


def test_an_error_inside_a_savepoint_breaks_nothing(worker: Worker, key: str, taken: str, database: Database) -> None:
    assert worker.call("swallow_in_savepoint", key, taken).state == "SUCCESS"
    assert database.rows(key) == ["around the savepoint"]


def test_a_retry_is_published_after_rollback_and_release(worker: Worker, lockable: str, database: Database) -> None:
    """The second attempt sees no row of the first and gets its row lock at once."""
    outcome = worker.call("retry_once", lockable)
    assert (outcome.state, outcome.value) == ("SUCCESS", {"attempt": 1, "first attempt left": []}), outcome
    assert worker.said(lockable) == [{"task": "retry_once", "rows": [], "open": 0}]
    assert database.rows(lockable) == ["second attempt"]


def test_a_retry_from_an_except_block_does_the_same(worker: Worker, lockable: str, database: Database) -> None:
    outcome = worker.call("retry_after_error", lockable)
    assert (outcome.state, outcome.value) == ("SUCCESS", {"attempt": 1, "first attempt left": []}), outcome
    assert worker.said(lockable) == [{"task": "retry_after_error", "rows": [], "open": 0}]
    assert database.rows(lockable) == ["second attempt"]


def test_autoretry_for_does_the_same(worker: Worker, lockable: str, database: Database) -> None:
    outcome = worker.call("autoretry_once", lockable)
    assert (outcome.state, outcome.value) == ("SUCCESS", {"attempt": 1, "first attempt left": []}), outcome
    assert worker.said(lockable) == [{"task": "autoretry_once", "rows": [], "open": 0}]
    assert database.rows(lockable) == ["second attempt"]


def test_twenty_retries_leak_no_connection(worker: Worker, key: str, database: Database) -> None:
    """Nothing is checked out afterwards either: every test of a worker ends with that check."""
    keys = [f"{key}{number}" for number in range(20)]
    for each in keys:
        database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=each)
    outcomes = worker.call_together("retry_once", [(each,) for each in keys])
    assert [outcome.state for outcome in outcomes] == ["SUCCESS"] * 20, outcomes
    assert len(database.connections(worker.name)) <= worker.probe()[0]["max_connections"]


def test_a_last_retry_that_fails_rolls_back(worker: Worker, key: str, database: Database) -> None:
    outcome = worker.call("retry_for_ever", key)
    assert (outcome.state, outcome.error) == ("FAILURE", "Boom")
    assert database.rows(key) == []


def test_replace_commits_before_the_replacement_is_published(
    worker: Worker, watched_key: str, database: Database
) -> None:
    outcome = worker.call("replace", watched_key)
    assert (outcome.state, outcome.value) == ("SUCCESS", ["before replace"])
    assert worker.said(watched_key) == [{"task": "read", "rows": ["before replace"], "open": 0}]


@pytest.mark.parametrize(("task", "state"), [("ignore", "IGNORED"), ("reject", "REJECTED")])
def test_ignore_and_reject_roll_back(worker: Worker, key: str, database: Database, task: str, state: str) -> None:
    assert worker.wait(worker.send(task, key), ended=state).state == state
    assert database.rows(key) == []


@pytest.mark.worker_pools("threads", "gevent", "eventlet")
def test_a_base_exception_rolls_back(worker: Worker, key: str, database: Database) -> None:
    """Celery stores no result for it, in these worker pools."""
    assert worker.wait(worker.send("abort", key), ended="NONE").state == "NONE"
    assert database.rows(key) == []


@pytest.mark.worker_pools("prefork")
@pytest.mark.parametrize("task", ["leave", "abort"])
def test_system_exit_rolls_back(worker: Worker, key: str, database: Database, task: str) -> None:
    """A pool process that ends takes no connection with it, and its successor works."""
    worker.wait(worker.send(task, key), ended="NONE")
    assert database.rows(key) == []
    assert worker.call("insert", key).state == "SUCCESS"
