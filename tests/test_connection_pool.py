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
PATIENCE_S = 6
"""`pool_timeout` of these workers: whoever waits so long has waited in vain."""
Start = Callable[..., AbstractContextManager[Worker]]


@pytest.fixture
def start(site: Site, database: PostgreSQL) -> Start:
    @contextlib.contextmanager
    def start(pool: str, concurrency: int, *, awaits: bool = False, **options: Any) -> Iterator[Worker]:
        name = f"{site.prefix[:-1]}-connections-{uuid.uuid4().hex[:6]}"
        url, settings = database.url(name), {"alchemy_engine_options": options}
        modules = ("endings", "sessions", "nesting", "callbacks", "helping")
        worker = Worker(
            site, name, pool, url, concurrency=concurrency, settings=settings, modules=modules, awaits=awaits
        )
        with running(worker):
            yield worker
            assert [report["checkedout"] for report in worker.probe()] == [0] * len(worker.probe())
        assert_no_connections(database, name)

    return start


def nest(worker: Worker, database: PostgreSQL, parties: int = PARTIES) -> tuple[list[Outcome], int]:
    """Let tasks hold a connection each and open a second unit; return outcomes, connections open meanwhile."""
    key = uuid.uuid4().hex
    ids = [worker.send("nested_at_once", key, parties) for _ in range(parties)]
    seen = worker.while_all_wait(f"{key}-nested", parties + 1, lambda: database.connections(worker.name))
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


@pytest.mark.parametrize("pool", ["prefork", "solo", "threads", "gevent", "eventlet"])
def test_helpers_of_a_task_are_served_one_after_another(start: Start, database: PostgreSQL, pool: str) -> None:
    """A task holds the only connection and waits for its helpers; all tasks do so at once, and none waits in vain."""
    parties = 2 if pool in {"gevent", "eventlet"} else 1
    with start(pool, parties, pool_timeout=PATIENCE_S) as worker:
        for how in ("threads", "executor", *({pool} & {"gevent", "eventlet"})):
            for ways in (["block"] * 2, ["block", "called", "applied", "deeper"]):
                key = uuid.uuid4().hex
                outcomes = worker.call_together("have_helpers", [(key, how, ways, parties)] * parties)
                assert [outcome.value for outcome in outcomes] == [["written"] * len(ways)] * parties, outcomes
                assert sorted(database.rows(key)) == sorted([*ways, "task"] * parties)
        assert len(database.connections(worker.name)) <= 2 * parties


@pytest.mark.parametrize("pool", ["prefork", "solo", "threads", "gevent", "eventlet"])
def test_a_task_whose_helpers_came_first_is_served(start: Start, database: PostgreSQL, pool: str) -> None:
    """They have its connection: the reserved slot that one of them gives back is for the task, too."""
    with start(pool, 1, pool_timeout=PATIENCE_S) as worker:
        for how in ("threads", *({pool} & {"gevent", "eventlet"})):
            key = uuid.uuid4().hex
            outcome = worker.call("come_after_helpers", key, how)
            assert outcome.value == ["written", "written"], outcome
            assert sorted(database.rows(key)) == ["quick", "slow", "task"]
            key = uuid.uuid4().hex
            refused = worker.call("have_a_helper_that_nests", key, how).value
            assert refused.startswith("ReservedSlotsInUse"), refused
            assert refused.count("unit_of_work() at") >= 2
            assert "have_a_helper_that_nests[" in refused
            assert database.rows(key) == ["task"]


@pytest.mark.parametrize("pool", ["threads", "gevent", "eventlet"])
def test_short_tasks_are_served_beside_long_nested_units(start: Start, database: PostgreSQL, pool: str) -> None:
    """Two tasks keep a nested unit of work open on reserved slots; two of four ordinary connections are free."""
    with start(pool, 4, pool_size=4, pool_timeout=PATIENCE_S) as worker:
        key = uuid.uuid4().hex
        ids = [worker.send("nested_at_once", key, PARTIES) for _ in range(PARTIES)]

        def serve() -> list[Outcome]:
            calls = [*[("insert", (key,))] * 5, *[("write_plainly", (key,))] * 5]
            return [worker.wait(task_id) for task_id in [worker.send(name, *args) for name, args in calls]]

        served = worker.while_all_wait(f"{key}-nested", PARTIES + 1, serve)
        assert [outcome.state for outcome in served] == ["SUCCESS"] * 10, served
        assert [worker.wait(task_id).value for task_id in ids] == ["own connection"] * PARTIES


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_tasks_leave_the_reserve_to_nested_units(start: Start, database: PostgreSQL, pool: str) -> None:
    """Tasks that are no DatabaseTask queue like all others, whatever their blocks are."""
    with start(pool, 8, pool_size=2, pool_timeout=60) as worker:
        key = uuid.uuid4().hex
        ids = [worker.send("nested_at_once", key, PARTIES + 1) for _ in range(PARTIES)]
        plain: list[str] = []

        def fill() -> None:
            plain.extend(worker.send("write_plainly", key) for _ in range(6))
            eventually(lambda: len(worker.inspect("active")) == 8, "all threads or greenlets run a task")

        worker.while_all_wait(f"{key}-holding", PARTIES + 1, fill)
        worker.while_all_wait(f"{key}-nested", PARTIES + 1, lambda: None)
        outcomes = [worker.wait(task_id) for task_id in ids]
        assert [outcome.value for outcome in outcomes] == ["own connection"] * PARTIES, outcomes
        outcomes = [worker.wait(task_id) for task_id in plain]
        assert [outcome.value for outcome in outcomes] == ["written"] * 6, outcomes


def test_a_worker_pool_that_grows_announces_its_connections_anew(start: Start, database: PostgreSQL) -> None:
    """`pool_grow` under prefork: as many pool processes as that open connections, and the log and `inspect sessions`
    say how many."""
    with start("prefork", 2) as worker:
        assert "at most 6 connections (2 pool processes and the main process, 2 each)" in worker.log()
        worker.control("pool_grow", n=4)
        eventually(lambda: len(worker.pool_processes()) == 6, "the pool processes have come", within_s=120)
        worker.concurrency = 6
        outcomes, count = nest(worker, database, 6)
        assert [outcome.value for outcome in outcomes] == ["own connection"] * 6, outcomes
        found = worker.inspect("sessions")
        assert found["concurrency"] == 6
        assert count == 12 <= found["databases"]["default"]["max_connections"] == 14
        told = [line for line in worker.log().splitlines() if "concurrency 6 instead of 2" in line]
        assert len(told) == 1, told
        assert "WARNING" in told[0]
        assert "at most 14 connections (6 pool processes and the main process, 2 each)" in told[0]
        worker.control("pool_shrink", n=3)
        eventually(lambda: len(worker.pool_processes()) == 3, "the pool processes have gone")
        worker.concurrency = 3
        assert worker.inspect("sessions")["databases"]["default"]["max_connections"] == 8


@pytest.mark.parametrize("awaits", [False, True], ids=["functions", "coroutines"])
def test_the_worker_pool_asyncio_announces_anew_what_grows(start: Start, database: PostgreSQL, awaits: bool) -> None:
    """More tasks at a time queue for the connections that were announced; the log and `inspect sessions` agree."""
    with start("asyncio", 2, awaits=awaits) as worker:
        announced = worker.probe()[0]["max_connections"]
        assert f"at most {announced} connections" in worker.log()
        worker.control("pool_grow", n=6)
        eventually(lambda: worker.inspect("sessions")["concurrency"] == 8, "the worker pool has grown")
        assert worker.inspect("sessions")["databases"]["default"]["max_connections"] == announced
        told = [line for line in worker.log().splitlines() if "concurrency 8 instead of 2" in line]
        assert len(told) == 1, told
        assert f"at most {announced} connections" in told[0]
        outcomes, count = nest(worker, database)
        assert [outcome.value for outcome in outcomes] == ["own connection"] * PARTIES, outcomes
        assert count <= announced
        worker.control("pool_shrink", n=5)
        eventually(lambda: worker.inspect("sessions")["concurrency"] == 3, "the worker pool has shrunk")
        outcomes = worker.call_together("insert", [(uuid.uuid4().hex,)] * 20)
        assert {outcome.state for outcome in outcomes} == {"SUCCESS"}, outcomes


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_greenlets_that_come_later_queue_for_the_connections_announced(
    start: Start, database: PostgreSQL, pool: str
) -> None:
    with start(pool, 2) as worker:
        announced = worker.probe()[0]["max_connections"]
        worker.control("pool_grow", n=6)
        eventually(lambda: worker.inspect("sessions")["concurrency"] == 8, "the worker pool has grown")
        outcomes = worker.call_together("write_plainly", [(uuid.uuid4().hex,)] * 40)
        assert [outcome.value for outcome in outcomes] == ["written"] * 40, outcomes
        outcomes, count = nest(worker, database)
        assert [outcome.value for outcome in outcomes] == ["own connection"] * PARTIES, outcomes
        assert count <= announced == worker.probe()[0]["max_connections"] == 4
