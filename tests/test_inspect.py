"""`celery inspect sessions`: what every process is doing now; `celery control recycle_connections`."""

import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import text
from support import databases, preloaded
from support.databases import PostgreSQL
from support.waiting import eventually
from support.worker import TESTS, Site, Worker, running

from celery_alchemy.workers.watching import control

POOLS = {"prefork": 3, "threads": 3, "gevent": 4, "eventlet": 4, "solo": 1}


@pytest.fixture(scope="module", params=POOLS)
def worker(request: pytest.FixtureRequest, site: Site, run_database: PostgreSQL) -> Iterator[Worker]:
    name = f"{site.prefix[:-1]}-inspected-{request.param}"
    worker = Worker(
        site, name, request.param, database_url=run_database.url(name), concurrency=POOLS[request.param],
        modules=("endings", "observed"),
    )  # fmt: skip
    with running(worker):
        yield worker
    databases.assert_no_connections(run_database, name)


def opened(worker: Worker) -> list[dict[str, Any]]:
    """Return what is open in all processes of the worker."""
    return [one for process in worker.inspect("sessions")["processes"] for one in process["open"]]


def while_open(worker: Worker, task: str, key: str, count: int) -> list[dict[str, Any]]:
    """Start `count` tasks that wait for one another and for us, and return what is seen meanwhile."""
    ids = [worker.send(task, key, count + 1) for _ in range(count)]
    seen = worker.while_all_wait(key, count + 1, lambda: opened(worker))
    for task_id in ids:
        assert worker.wait(task_id).state == "SUCCESS"
    return seen


def skip_solo(worker: Worker) -> None:
    if worker.pool == "solo":
        pytest.skip("solo answers nobody while its one task runs")


def test_what_is_open_now(worker: Worker, key: str) -> None:
    """Statements are noted from the first question on."""
    skip_solo(worker)
    opened(worker)
    seen = while_open(worker, "wait_in_transaction", key, 3)
    assert len(seen) == 3, seen
    for one in seen:
        assert one["task"] == "wait_in_transaction"
        assert len(one["id"]) == 32
        assert one["statements"] == 2
        assert one["state"] == "idle in transaction"
        assert one["statement"] == "SELECT ? AS secret", "its literal is masked"
        assert 0 <= one["since_s"] <= one["age_s"] < 30
    assert "the last one" not in str(seen)
    assert opened(worker) == []


def test_one_that_is_in_a_statement_answers_too(worker: Worker, key: str, run_database: PostgreSQL) -> None:
    skip_solo(worker)
    number = int(key[:8], 16)
    with run_database.engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:number)"), {"number": number})
        task_id = worker.send("wait_for_a_lock", number)
        eventually(lambda: [one["state"] for one in opened(worker)] == ["in a statement"], "it is in its statement")
        connection.execute(text("SELECT pg_advisory_unlock(:number)"), {"number": number})
    assert worker.wait(task_id).state == "SUCCESS"


def test_after_a_commit_it_holds_nothing(worker: Worker, key: str) -> None:
    skip_solo(worker)
    assert {one["state"] for one in while_open(worker, "wait_after_commit", key, 2)} == {"no transaction"}


def test_nested_ones_are_shown(worker: Worker, key: str) -> None:
    skip_solo(worker)
    opened(worker)
    seen = while_open(worker, "wait_nested", key, 1)
    assert [one["statements"] for one in seen] == [1, 2]
    assert seen[0]["task"] == "wait_nested"
    assert "unit_of_work() at" in seen[1]["task"]


def test_a_helper_thread_that_outlives_its_task_is_shown(worker: Worker, key: str) -> None:
    """With a unit of work, or with a connection that is of none."""
    skip_solo(worker)
    opened(worker)
    states = {"in_a_unit_of_work": 1, "on_a_connection": 1, "in_a_session": 1, "after_its_transaction": 0}
    for kind, in_transaction in states.items():
        barrier = f"{key}-{kind}"
        assert worker.call("leave_a_helper", kind, barrier, 2).state == "SUCCESS"
        (seen,) = worker.while_all_wait(barrier, 2, lambda: opened(worker))
        assert seen["state"] == ("idle in transaction" if in_transaction else "no transaction"), seen
        assert seen["statement"] == "SELECT ?"
        assert seen["since_s"] >= 0
        place = "unit_of_work() at " if kind == "in_a_unit_of_work" else "connection checked out at "
        assert seen["task"].startswith(place), seen
        assert "observed.py:" in seen["task"]
        eventually(lambda: opened(worker) == [], "it has ended")


def test_totals(worker: Worker, key: str) -> None:
    for _ in range(POOLS[worker.pool] * 2):
        assert worker.call("server_pid").state == "SUCCESS"
    assert worker.call("wait_in_statement", key, 0.5).state == "SUCCESS"
    answer = worker.inspect("sessions")
    assert answer["worker_pool"] == worker.pool
    assert answer["concurrency"] == POOLS[worker.pool]
    assert answer["databases"]["default"]["strategy"] in {"local", "scoped", "per_process"}
    assert answer["databases"]["default"]["max_connections"] > 0
    processes = answer["processes"]
    assert {process["pid"] for process in processes} <= (worker.pool_processes() or {worker.pid})
    assert sum(process["ended"] for process in processes) >= POOLS[worker.pool] * 2 + 1
    longest = max((process["longest"] for process in processes if process["longest"]), key=lambda one: one["s"])
    assert longest["s"] >= 0.5
    counts = [process["connections"].get("default", process["connections"]) for process in processes]
    assert sum(count["open"] for count in counts) >= 1
    assert sum(count["checked out"] for count in counts) == 0


def test_leaks_are_counted(worker: Worker) -> None:
    def leaks() -> int:
        return sum(process["leaks"] for process in worker.inspect("sessions")["processes"])

    before = leaks()
    assert worker.call("keep_a_connection").state == "SUCCESS"
    eventually(lambda: leaks() == before + 1, "it is counted")


def test_connections_are_recycled(worker: Worker, run_database: PostgreSQL) -> None:
    def pids() -> set[int]:
        calls = worker.call_together("server_pid", [()] * POOLS[worker.pool] * 6)
        return {outcome.value for outcome in calls}

    before = pids()
    assert "ok" in worker.inspect("recycle_connections")
    after = pids()
    for _ in range(3):
        after |= pids()
    assert before & after == set() or worker.pool == "prefork"
    # A pool process that had no task since still has its old one.
    eventually(lambda: not {one.pid for one in run_database.connections(worker.name)} & before & pids(), "all are new")


def test_a_pool_process_that_is_gone_is_left_out(worker: Worker) -> None:
    if worker.pool != "prefork":
        pytest.skip("there is one process")
    worker.control("pool_shrink", n=1)
    eventually(lambda: len(worker.inspect("sessions")["processes"]) == 2, "two are left")
    worker.control("pool_grow", n=1)
    eventually(lambda: len(worker.pool_processes()) == 3, "it has come back")
    for _ in range(12):
        worker.call("server_pid")
    assert {process["pid"] for process in worker.inspect("sessions")["processes"]} <= worker.pool_processes()


def test_the_command_line_knows_it(worker: Worker, site: Site) -> None:
    command = [sys.executable, "-m", "celery", "-A", "support.project.app", "inspect", "sessions", "--json", "-t", "60"]
    command += ["-d", f"{worker.name}@here"]
    environment = {**os.environ, **worker._project(), "PYTHONPATH": str(TESTS)}
    done = preloaded.run(command, cwd=TESTS, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr
    assert '"processes"' in done.stdout


def test_every_answer_has_the_same_keys(worker: Worker, key: str) -> None:
    """Of a worker, of one without an Alchemy, of a process with something open and of one without."""
    skip_solo(worker)
    found = worker.inspect("sessions")
    app = Celery("without", set_as_current=False)
    assert set(control.sessions(SimpleNamespace(app=app))) == set(found)
    assert found["error"] is found["outbox"] is None
    task_id = worker.send("wait_in_transaction", key, 2)
    busy = worker.while_all_wait(key, 2, lambda: worker.inspect("sessions"))
    assert worker.wait(task_id).state == "SUCCESS"
    shapes = {(frozenset(one), frozenset(one["connections"])) for one in [*found["processes"], *busy["processes"]]}
    assert len(shapes) == 1
