"""A pool process that is killed in the middle of a query: PostgreSQL notices, and lets the row locks go."""

import os
import signal

import pytest
from support.databases import PostgreSQL, assert_no_connections, assert_not_busy
from support.waiting import eventually
from support.worker import Start, Worker

SLEEP_S = 60
"""How long the query of the killed task goes on where nobody notices."""


@pytest.mark.parametrize("strategy", ["local", "scoped", "per_process"])
def test_the_query_of_a_killed_pool_process_ends(
    start: Start, run_database: PostgreSQL, key: str, strategy: str
) -> None:
    with start("prefork", strategy=strategy, concurrency=1) as worker:
        task_id = worker.send("sleep_in_sql", key, SLEEP_S)
        asleep = lambda: [one for one in run_database.busy(worker.name) if "pg_sleep" in one.query]  # noqa: E731
        eventually(asleep, "the task is in its query")
        (pool_process,) = worker.pool_processes()
        os.kill(pool_process, signal.SIGKILL)
        assert worker.wait(task_id).error == "WorkerLostError"
        eventually(lambda: not asleep(), "the server has noticed", within_s=SLEEP_S / 3)
        assert worker.call("insert", key, "the next one").state == "SUCCESS"
        assert run_database.rows(key) == ["the next one"]


@pytest.mark.parametrize("how", ["os._exit", "SIGKILL in a statement"])
def test_a_killed_task_is_lost_or_delivered_again_and_finds_clean_data(
    start: Start, run_database: PostgreSQL, key: str, how: str
) -> None:
    """As its acknowledgement says; its row lock is free, none of its rows is there, the next process works."""
    in_statement = how != "os._exit"
    with start("prefork", concurrency=1, modules=("endings", "limits", "kills")) as worker:
        for task in ("die", "die_late"):
            own = f"{key}-{task}"[:60]
            run_database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=own)
            task_id = worker.send(task, own, "statement" if in_statement else how)
            if in_statement:
                eventually(
                    lambda: [one for one in run_database.busy(worker.name) if "pg_sleep" in one.query], "it sleeps"
                )
                os.kill(*worker.pool_processes(), signal.SIGKILL)
            outcome = worker.wait(task_id)
            if task == "die":
                assert outcome.error == "WorkerLostError"
                assert run_database.rows(own) == []
            else:
                assert (outcome.state, outcome.value) == ("SUCCESS", []), "the second attempt finds clean data"
                assert run_database.rows(own) == ["attempt 2"]
            assert worker.call("take_lock", own).value == 1


MODULES = ("endings", "limits", "kills")


def in_a_statement(database: PostgreSQL, worker: Worker) -> bool:
    return any("pg_sleep" in one.query for one in database.busy(worker.name))


def nothing_is_left_of_it(worker: Worker, database: PostgreSQL, key: str, times: int) -> None:
    """The row lock is free, no row is there, and the next task is as good as any."""
    assert database.rows(key) == []
    assert worker.call("take_lock", key).value == times


@pytest.mark.parametrize("strategy", ["local", "scoped", "per_process"])
def test_ended_from_outside_in_the_middle_of_a_statement(
    start: Start, run_database: PostgreSQL, key: str, strategy: str
) -> None:
    """A hard time limit, and a revocation with TERM and with KILL."""
    run_database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=key)
    with start("prefork", strategy=strategy, concurrency=1, modules=MODULES) as worker:
        task_id = worker.send("die", key, "statement", time_limit=1)
        assert worker.wait(task_id).error == "TimeLimitExceeded"
        nothing_is_left_of_it(worker, run_database, key, 1)
        for times, name in enumerate(("TERM", "KILL"), 2):
            task_id = worker.send("die", key, "statement")
            eventually(lambda: in_a_statement(run_database, worker), "it sleeps")
            worker.control("revoke", task_id=task_id, terminate=True, signal=name)
            assert worker.wait(task_id).error in {"Terminated", "TaskRevokedError", "WorkerLostError"}, name
            nothing_is_left_of_it(worker, run_database, key, times)


@pytest.mark.parametrize("pool", ["threads", "gevent", "eventlet"])
def test_a_memory_error(start: Start, run_database: PostgreSQL, key: str, pool: str) -> None:
    """Celery reports nothing; the transaction is rolled back, the connection given back."""
    run_database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=key)
    with start(pool, concurrency=1, modules=MODULES) as worker:
        worker.wait(worker.send("run_out_of_memory", key, "raised"), ended="NONE")
        nothing_is_left_of_it(worker, run_database, key, 1)
        assert {report["checkedout"] for report in worker.probe()} == {0}


@pytest.mark.parametrize(("pool", "how"), [("prefork", "for real"), ("solo", "raised")])
def test_a_memory_error_that_ends_the_worker(
    start: Start, run_database: PostgreSQL, key: str, pool: str, how: str
) -> None:
    """As Celery wants it in these two worker pools; its supervisor starts another, which finds clean data."""
    run_database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=key)
    with start(pool, concurrency=1, modules=MODULES) as worker:
        worker.send("run_out_of_memory", key, how)
        eventually(lambda: not worker.is_running(), "it has ended")
        worker.expected_code = None
        assert_no_connections(run_database, worker.name)
    with start(pool, concurrency=1, modules=MODULES) as worker:
        nothing_is_left_of_it(worker, run_database, key, 1)


@pytest.mark.parametrize("strategy", ["local", "scoped", "per_process"])
@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_a_greenlet_that_is_killed_harms_no_other(
    start: Start, run_database: PostgreSQL, key: str, pool: str, strategy: str
) -> None:
    """Every second of the tasks that sleep in a statement is revoked: the others get their own answers."""
    count = 8
    with start(pool, strategy=strategy, concurrency=count, modules=MODULES) as worker:
        ids = [worker.send("bear", key, str(number), 1.5) for number in range(count)]
        eventually(lambda: len(run_database.busy(worker.name)) == count, "all are in a statement")
        for task_id in ids[::2]:
            worker.control("revoke", task_id=task_id, terminate=True, signal="KILL")
        outcomes = [worker.wait(task_id) for task_id in ids[1::2]]
        assert [outcome.value for outcome in outcomes] == list(range(1, count, 2))
        assert sorted(map(int, run_database.rows(key))) == list(range(1, count, 2))
        assert_not_busy(run_database, worker.name)
        assert {report["checkedout"] for report in worker.probe()} == {0}
        again = worker.call_together("bear", [(f"{key}-again", str(number), 0.01) for number in range(2 * count)])
        assert [outcome.value for outcome in again] == list(range(2 * count))
