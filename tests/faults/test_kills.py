"""A pool process that is killed in the middle of a query: PostgreSQL notices, and lets the row locks go."""

import os
import signal

import pytest
from support.databases import PostgreSQL
from support.waiting import eventually
from support.worker import Start

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
