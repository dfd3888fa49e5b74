"""Deadlocks, serialization failures, locks that are taken: with `autoretry_for` all tasks get through, once each."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.databases import Database, PostgreSQL
from support.worker import Start, Worker

TASKS = 24
POOLS = {"prefork": 4, "threads": 8, "gevent": 16, "eventlet": 16}


@pytest.fixture(params=POOLS, scope="module")
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def worker(start: Start, pool: str) -> Iterator[Worker]:
    with start(pool, concurrency=POOLS[pool], modules=("endings", "sessions", "transient")) as worker:
        yield worker


def attempts(worker: Worker, calls: list[tuple[Any, ...]], task: str) -> list[int]:
    """Run the tasks all at once; return how many attempts each took."""
    ids = [worker.send(task, *call) for call in calls]
    outcomes = [worker.wait(task_id) for task_id in ids]
    assert [o for o in outcomes if o.state != "SUCCESS"] == []
    return [outcome.value for outcome in outcomes]


def counter(database: Database, key: str) -> None:
    database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=key)


def value(database: Database, key: str) -> int:
    return int(database.column("SELECT value FROM counters WHERE key_ = :key", key=key)[0])


def test_contention_is_got_through(worker: Worker, run_database: PostgreSQL, key: str) -> None:
    """One worker for all of it: deadlocks, write skew, locks without waiting, a swallowed error."""
    for name in ("a", "b", "c"):
        counter(run_database, f"{key}-{name}")
    tries = attempts(worker, [(f"{key}-{'ab'[i % 2]}", f"{key}-{'ba'[i % 2]}") for i in range(TASKS)], "lock_both")
    assert value(run_database, f"{key}-a") == value(run_database, f"{key}-b") == TASKS
    assert max(tries) > 1, "no deadlock, so nothing is shown"

    tries = attempts(worker, [(key,)] * TASKS, "number")
    assert sorted(map(int, run_database.rows(key))) == list(range(TASKS))
    assert max(tries) > 1, "no serialization failure, so nothing is shown"

    tries = attempts(worker, [(f"{key}-c",)] * TASKS, "lock_impatiently")
    assert value(run_database, f"{key}-c") == TASKS
    assert max(tries) > 1, "the lock was always free, so nothing is shown"

    assert attempts(worker, [(f"{key}-swallowed"[:60],)], "swallow_and_go_on") == [2]
    assert run_database.rows(f"{key}-swallowed"[:60]) == ["attempt 2"]


def test_more_tasks_than_the_server_accepts_connections(start: Start, run_database: PostgreSQL, key: str) -> None:
    """ "Too many connections": whoever is refused comes again, and nobody is lost."""
    role = f"few_{key[:8]}"
    run_database.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 3")
    run_database.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    run_database.execute(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}")
    url = run_database.engine.url.set(drivername="postgresql+psycopg", username=role)
    url = url.update_query_dict({"application_name": role})
    try:
        with start(
            "gevent", url=url.render_as_string(hide_password=False), concurrency=16, modules=("endings", "transient")
        ) as worker:
            tries = attempts(worker, [(key, str(i), 0.05) for i in range(TASKS)], "write_surely")
            assert max(tries) > 1, "nobody was refused, so nothing is shown"
            assert sorted(map(int, run_database.rows(key))) == list(range(TASKS))
    finally:
        run_database.execute(f"DROP OWNED BY {role}")
        run_database.execute(f"DROP ROLE {role}")


def test_an_exhausted_connection_pool(start: Start, run_database: PostgreSQL, key: str) -> None:
    """200 greenlets, 5 connections, and each task wants a second one: nobody waits for itself, nobody fails."""
    settings = {"alchemy_engine_options": {"pool_size": 5, "pool_timeout": 20}}
    with start("gevent", concurrency=200, settings=settings, modules=("endings", "transient")) as worker:
        assert attempts(worker, [(key, str(i)) for i in range(200)], "hold_and_want_more") == [1] * 200
        for rows in (run_database.rows(key), run_database.rows(f"{key}-inner")):
            assert sorted(map(int, rows)) == list(range(200))
        assert len(run_database.connections(worker.name)) <= 10
