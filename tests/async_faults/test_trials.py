"""What coroutines do wrong, or in their own way: real workers, psycopg."""

from collections import Counter

import pytest
from support.databases import PostgreSQL
from support.worker import Worker

SHARING = (
    *("execute", "scalar", "stream", "connection", "flush", "commit", "rollback", "close", "invalidate", "reset"),
    *("begin_nested", "get", "run_sync", "task group", "shield"),
)


@pytest.mark.parametrize("units", [False, True], ids=["session", "children's units"])
def test_no_task_sees_anything_of_another(unharmed: Worker, database: PostgreSQL, key: str, units: bool) -> None:
    """Its request, its context and its Session before and after each await, in children, threads and listeners."""
    tasks = 200 if unharmed.pool == "asyncio" else 20
    outcomes = unharmed.call_together("look_around", [(key, f"name {number}", units) for number in range(tasks)])
    assert [outcome for outcome in outcomes if outcome.state != "SUCCESS" or outcome.value] == []
    assert Counter(Counter(database.rows(key)).values()) == {1 if not units else 2: tasks * 2}


@pytest.mark.parametrize("how", SHARING)
def test_a_child_may_not_use_the_session_of_its_task(
    unharmed: Worker, database: PostgreSQL, key: str, how: str
) -> None:
    """It is told what to write instead, and the task goes on."""
    outcome = unharmed.call("share", key, how)
    assert outcome.state == "SUCCESS", outcome
    assert {error.partition(":")[0] for error in outcome.value} == {"SharedSession"}, outcome.value
    assert all("async with db.async_unit_of_work()" in error for error in outcome.value)
    assert database.rows(key) == ["before", "pending"]


@pytest.mark.parametrize("how", ["timeout", "anyio", "group", "unit", "anyio unit", "anyio group"])
def test_a_task_ends_its_own_statement_and_goes_on(unharmed: Worker, database: PostgreSQL, key: str, how: str) -> None:
    outcome = unharmed.call("cut", key, how)
    assert (outcome.state, outcome.value) == ("SUCCESS", "went on"), outcome
    assert database.rows(key) == ["after"]


def test_a_statement_that_was_ended_loses_the_transaction(unharmed: Worker, database: PostgreSQL, key: str) -> None:
    """A task that does not roll back then may not succeed."""
    outcome = unharmed.call("cut", key, "timeout", False)
    assert outcome.state == "FAILURE"
    assert "rollback" in outcome.message
    assert database.rows(key) == []


def test_an_ordinary_unit_of_work_in_a_thread(unharmed: Worker, database: PostgreSQL, key: str) -> None:
    outcome = unharmed.call("ordinary_unit", key)
    assert outcome.state == "SUCCESS", outcome
    assert outcome.value >= 3
    assert sorted(database.rows(key)) == ["of the task", "of the thread"]


COMMITS = ("commit", "begin", "transaction", "nested", "called", "applied", "connection", "engine", "own session")


@pytest.mark.parametrize("how", [*COMMITS, "child"])
def test_a_limit_waits_for_the_commit_and_comes_then(
    unharmed: Worker, database: PostgreSQL, key: str, how: str
) -> None:
    outcome = unharmed.call("commit_slowly", key, how, True, soft_time_limit=0.7)
    assert (outcome.state, outcome.error) == ("FAILURE", "SoftTimeLimitExceeded"), outcome
    if how != "child":  # it is its task that the limit ends, and with it the child
        assert database.rows(key) == ["committed slowly"]


@pytest.mark.parametrize("how", [*COMMITS, "end"])
def test_a_limit_in_the_last_commit_changes_nothing(unharmed: Worker, database: PostgreSQL, key: str, how: str) -> None:
    outcome = unharmed.call("commit_slowly", key, how, False, soft_time_limit=0.7)
    assert (outcome.state, outcome.value) == ("SUCCESS", "ended"), outcome
    assert database.rows(key) == ["committed slowly"]


def test_a_task_catches_its_limit(unharmed: Worker, database: PostgreSQL, key: str) -> None:
    assert unharmed.call("swallow_limit", key, soft_time_limit=0.3).value == "went on"
    assert database.rows(key) == ["after"]


def test_a_stream_left_open_keeps_nothing(unharmed: Worker, database: PostgreSQL, key: str) -> None:
    outcome = unharmed.call("leave_stream_open", key)
    assert outcome.state == "SUCCESS", outcome
    assert database.rows(key) == ["before"]


@pytest.mark.parametrize("keeps", [False, True])
def test_a_generator_left_open_keeps_nothing(unharmed: Worker, database: PostgreSQL, key: str, keeps: bool) -> None:
    """A unit of work in it ends with the task at the latest, and does not commit."""
    outcome = unharmed.call("leave_generator_open", key, keeps)
    assert outcome.state == "SUCCESS", outcome
    assert database.rows(key) == ["of the task"]
    assert {report["checkedout"] for report in unharmed.probe()} == {0}
    for _ in range(unharmed.concurrency if unharmed.pool == "prefork" else 1):
        unharmed.call("drop_kept")


@pytest.mark.parametrize("holds", [False, True], ids=["waiting", "holding"])
def test_many_units_on_few_connections_end(unharmed: Worker, database: PostgreSQL, key: str, holds: bool) -> None:
    """Two hundred children on eight connections; with a connection in the hand, they are refused at once or served."""
    outcome = unharmed.call("many_units", key, holds)
    assert outcome.state == "SUCCESS", outcome
    assert sum(outcome.value.values()) == 200
    assert set(outcome.value) <= {"done", "ReservedSlotsInUse"}, outcome.value
    done = [note for note in database.rows(key) if note.startswith("child")]
    assert len(done) == len(set(done)) == outcome.value["done"]
    if not holds:
        assert len(done) == 200


def test_a_child_that_outlives_its_task_ends_by_itself(unharmed: Worker, database: PostgreSQL, key: str) -> None:
    outcome = unharmed.call("leave_child_running", key, 0.3)
    assert outcome.state == "SUCCESS", outcome
    while len(rows := database.rows(key)) < 2:
        assert unharmed.is_running()
    assert sorted(rows) == ["of the child", "of the task"]


def test_a_group_of_errors_fails_the_task(unharmed: Worker, database: PostgreSQL, key: str) -> None:
    outcome = unharmed.call("raise_group", key)
    assert (outcome.state, outcome.error) == ("FAILURE", "ExceptionGroup")
    assert database.rows(key) == []


def test_bodies_children_and_threads_publish_together(unharmed: Worker, key: str) -> None:
    """All of them share the app's ten producers."""
    tasks = 60 if unharmed.pool == "asyncio" else 4
    outcomes = unharmed.call_together("publish_everywhere", [(key, 3)] * tasks)
    assert {outcome.value for outcome in outcomes} == {"published"}


def test_tasks_send_commands_together(unharmed: Worker, key: str) -> None:
    tasks = 60 if unharmed.pool == "asyncio" else 4
    outcomes = unharmed.call_together("command", [(key,)] * tasks)
    assert {outcome.value for outcome in outcomes} == {"told"}


@pytest.mark.parametrize(
    ("how", "rows"),
    [
        ("end", ["of the task", "in the callback"]),
        ("commit", ["of the task", "in the callback"]),
        ("child", ["of the child", "in the callback", "of the task"]),
    ],
)
def test_a_callback_after_the_commit_may_await(
    unharmed: Worker, database: PostgreSQL, key: str, how: str, rows: list[str]
) -> None:
    outcome = unharmed.call("call_back", key, how)
    assert (outcome.state, outcome.value) == ("SUCCESS", "called back"), outcome
    assert database.rows(key) == rows


def test_apply_in_a_coroutine_runs_now_or_says_what_to_do(unharmed: Worker, database: PostgreSQL, key: str) -> None:
    """A child coroutine cannot wait for it; the task's own can, and the task has a unit of work of its own."""
    outcome = unharmed.call("apply_here", key)
    assert outcome.state == "SUCCESS", outcome
    in_body, in_child = outcome.value
    assert in_body == "SUCCESS"
    assert "await insert(...)" in in_child
    assert sorted(database.rows(key)) == ["applied", "of the task"]


def test_a_retry_inside_except_exception(unharmed: Worker, database: PostgreSQL, watched_key: str) -> None:
    """When its message is sent, everyone can see that the first attempt has been rolled back."""
    outcome = unharmed.call("retry_anyhow", watched_key, "body")
    assert (outcome.state, outcome.value) == ("SUCCESS", "retried"), outcome
    assert unharmed.said(watched_key)[-1:] == [{"task": "retry_anyhow", "rows": [], "open": 0}]
    assert database.rows(watched_key) == ["second attempt"]


def test_a_child_may_not_retry(unharmed: Worker, database: PostgreSQL, key: str) -> None:
    """It cannot wait for the ROLLBACK of its task."""
    outcome = unharmed.call("retry_anyhow", key, "child")
    assert (outcome.state, outcome.error) == ("FAILURE", "CeleryAlchemyError"), outcome
    assert database.rows(key) == []
