"""The user's `alchemy_engine_options` win over what the worker pool suggests, and nested units still never wait."""

import contextlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from support.databases import PostgreSQL, assert_no_connections
from support.waiting import eventually
from support.worker import Outcome, Site, Worker, running

PARTIES = 2
Start = Callable[..., AbstractContextManager[Worker]]


@pytest.fixture
def start(site: Site, database: PostgreSQL) -> Start:
    @contextlib.contextmanager
    def start(pool: str, concurrency: int, **options: Any) -> Iterator[Worker]:
        name = f"{site.prefix[:-1]}-connections-{uuid.uuid4().hex[:6]}"
        url, settings = database.url(name), {"alchemy_engine_options": options}
        with running(Worker(site, name, pool, url, concurrency=concurrency, settings=settings)) as worker:
            yield worker
            assert [report["checkedout"] for report in worker.probe()] == [0] * len(worker.probe())
        assert_no_connections(database, name)

    return start


def nest(worker: Worker, database: PostgreSQL) -> tuple[list[Outcome], int]:
    """Let two tasks hold a connection each and open a second unit; return outcomes, connections open meanwhile."""
    key = uuid.uuid4().hex
    ids = [worker.send("nested_at_once", key, PARTIES) for _ in range(PARTIES)]
    seen = worker.while_all_wait(f"{key}-nested", PARTIES + 1, lambda: database.connections(worker.name))
    return [worker.wait(task_id) for task_id in ids], len(seen)


@pytest.mark.parametrize("pool", ["threads", "gevent", "eventlet"])
def test_a_pool_size_of_the_users_keeps_a_reserve(start: Start, database: PostgreSQL, pool: str) -> None:
    """Two tasks fill it; each still gets a second connection, and the announced maximum has counted that."""
    with start(pool, 8, pool_size=PARTIES) as worker:
        outcomes, count = nest(worker, database)
        assert [outcome.value for outcome in outcomes] == ["own connection"] * PARTIES, outcomes
        assert 2 * PARTIES == count <= worker.probe()[0]["max_connections"]


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_without_room_a_nested_unit_is_refused_at_once(start: Start, database: PostgreSQL, pool: str) -> None:
    """No waiting for itself: the error names the task that holds, the unit that asks, and the setting to change."""
    with start(pool, 8, pool_size=PARTIES, max_overflow=0) as worker:
        outcomes, count = nest(worker, database)
        for outcome in outcomes:
            assert outcome.value.startswith("ReservedSlotsInUse"), outcome
            for part in ("nested_at_once", "unit_of_work", "alchemy_engine_options"):
                assert part in outcome.value
        assert count == PARTIES == worker.probe()[0]["max_connections"]


@pytest.mark.parametrize("pool", ["threads", "gevent", "eventlet"])
def test_tasks_queue_for_the_connections_there_are(start: Start, database: PostgreSQL, pool: str) -> None:
    """Forty writing tasks, eight at once, on two connections: all are served, none opens a third."""
    with start(pool, 8, pool_size=2, max_overflow=0) as worker:
        key = uuid.uuid4().hex
        database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=key)
        outcomes = worker.call_together("increment", [(key,)] * 40)
        assert sorted(outcome.value for outcome in outcomes) == list(range(1, 41)), outcomes
        assert len(database.connections(worker.name)) <= worker.probe()[0]["max_connections"] == 2


@pytest.mark.parametrize("strategy", ["local", "scoped", "per_process"])
def test_the_prefork_parent_keeps_no_connection(site: Site, database: PostgreSQL, strategy: str) -> None:
    """A handler of worker_ready has used one there; the parent may fork again."""
    name = f"{site.prefix[:-1]}-parent-{strategy}"
    url = database.url(name)
    with running(Worker(site, name, "prefork", url, strategy, writes_when_ready=True)) as worker:
        assert database.rows(name) == ["ready"]
        assert database.connections(name) == []
        assert worker.call("insert", name).state == "SUCCESS"


def test_prefork_keeps_one_connection_per_process(start: Start, database: PostgreSQL) -> None:
    """After nested units the process gives back what it borrowed, and its one connection stays for the next task."""
    with start("prefork", 2) as worker:
        nest(worker, database)
        outcomes = worker.call_together("insert", [(uuid.uuid4().hex,)] * 60)
        assert [outcome.state for outcome in outcomes] == ["SUCCESS"] * 60
        eventually(lambda: len(database.connections(worker.name)) == 2, "one connection per process is left")
