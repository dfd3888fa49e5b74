"""Endings that take a PostgreSQL: deferred constraints, aborted transactions, limits in the middle of a statement."""

import pytest
from support.databases import PostgreSQL
from support.waiting import eventually
from support.worker import Worker

SOFT_LIMIT_S = 0.5


def test_a_swallowed_statement_error_fails_the_task(worker: Worker, key: str, database: PostgreSQL) -> None:
    """The Session knows of no error, and PostgreSQL answers COMMIT with ROLLBACK: the task must not succeed."""
    database.execute("INSERT INTO users (name) VALUES (:name)", name=key)
    outcome = worker.call("swallow_statement_error", key, key)
    assert outcome.state == "FAILURE", outcome
    assert "self.db.rollback()" in outcome.message
    assert "users_name_key" in outcome.traceback
    assert database.rows(key) == []


def test_a_failing_commit_fails_the_task(worker: Worker, watched_key: str, database: PostgreSQL) -> None:
    """And its links are not sent."""
    outcome = worker.call("orphan", watched_key, link=[worker.signature("read", watched_key)])
    assert (outcome.state, outcome.error) == ("FAILURE", "IntegrityError")
    assert "children" in outcome.message
    assert database.rows(watched_key) == []
    assert worker.said(watched_key) == []


def test_autoretry_for_sees_a_failing_commit(worker: Worker, key: str, database: PostgreSQL) -> None:
    outcome = worker.call("orphan_once", key)
    assert (outcome.state, outcome.value) == ("SUCCESS", 1)
    assert database.rows(key) == ["attempt 1"]


def sleeping(database: PostgreSQL, worker: Worker) -> bool:
    return any("pg_sleep" in c.query and c.state == "active" for c in database.connections(worker.name))


@pytest.mark.worker_pools("prefork")
def test_a_soft_limit_in_a_statement_is_what_is_reported(worker: Worker, key: str, database: PostgreSQL) -> None:
    """The row is rolled back, the statement is gone from the server, the next tasks of both pool processes work."""
    outcome = worker.call("sleep_in_sql", key, soft_time_limit=SOFT_LIMIT_S)
    assert (outcome.state, outcome.error) == ("FAILURE", "SoftTimeLimitExceeded"), outcome
    eventually(lambda: not sleeping(database, worker), "the statement was cancelled")
    assert database.rows(key) == []
    outcomes = worker.call_together("insert", [(key, "next")] * 4)
    assert [outcome.state for outcome in outcomes] == ["SUCCESS"] * 4, outcomes


@pytest.mark.worker_pools("prefork")
def test_a_caught_soft_limit_leaves_a_session_that_rollback_mends(
    worker: Worker, key: str, database: PostgreSQL
) -> None:
    outcome = worker.call("sleep_in_sql_caught", key, soft_time_limit=SOFT_LIMIT_S)
    assert outcome.state == "SUCCESS", outcome
    assert database.rows(key) == ["after the limit"]
    assert not sleeping(database, worker)


@pytest.mark.def_only  # a coroutine that does not await stops its event loop
@pytest.mark.worker_pools("prefork")
def test_a_soft_limit_between_statements_rolls_back(worker: Worker, key: str, database: PostgreSQL) -> None:
    outcome = worker.call("busy", key, False, soft_time_limit=SOFT_LIMIT_S)
    assert (outcome.state, outcome.error) == ("FAILURE", "SoftTimeLimitExceeded"), outcome
    assert database.rows(key) == []


@pytest.mark.def_only
@pytest.mark.worker_pools("prefork")
def test_a_soft_limit_caught_between_statements_is_an_ordinary_return(
    worker: Worker, key: str, database: PostgreSQL
) -> None:
    assert worker.call("busy", key, True, soft_time_limit=SOFT_LIMIT_S).state == "SUCCESS"
    assert database.rows(key) == ["before the limit", "after the limit"]


@pytest.mark.worker_pools("gevent")
def test_gevent_timeout_in_a_statement_rolls_back(worker: Worker, key: str, database: PostgreSQL) -> None:
    """The hard limit of the gevent worker pool is an exception inside the task."""
    outcome = worker.call("sleep_in_sql", key, time_limit=1)
    assert (outcome.state, outcome.error) == ("FAILURE", "TimeLimitExceeded"), outcome
    eventually(lambda: not sleeping(database, worker), "the statement was cancelled")
    assert database.rows(key) == []


@pytest.mark.worker_pools("prefork")
def test_a_hard_kill_harms_no_other_task(worker: Worker, key: str, database: PostgreSQL) -> None:
    """The server ends the transaction of the lost process once its statement is over; others go on."""
    killed = worker.send("sleep_in_sql", key, 2, time_limit=1)
    others = worker.call_together("insert", [(key, "other")] * 4)
    assert [outcome.state for outcome in others] == ["SUCCESS"] * 4, others
    assert worker.wait(killed).error == "TimeLimitExceeded"
    assert database.rows(key) == ["other"] * 4
