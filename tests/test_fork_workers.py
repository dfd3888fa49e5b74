"""Real prefork workers: main processes that use the database, pool processes that come and go, spawned ones."""

import contextlib
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import celery
import psutil
import pytest
from support import databases, forking
from support import worker as workers
from support.waiting import eventually

#: Spawned pool processes, and hooks in the main process after a hard time limit.
since_5_7 = pytest.mark.skipif(celery.VERSION[:2] < (5, 7), reason="Celery does this since 5.7")
STRATEGIES = ("local", "scoped", "per_process", "engine")


@contextlib.contextmanager
def prefork(
    site: workers.Site, database: databases.Database, strategy: str, *arguments: str, **options: Any
) -> Iterator[workers.Worker]:
    """Run a worker whose main process uses the Engine at import, in worker_init and when ready.

    After its warm shutdown the server lists none of its connections.
    """
    name = f"{site.prefix[:-1]}-forks-{uuid.uuid4().hex[:6]}"
    worker = workers.Worker(
        site,
        name,
        "prefork",
        database_url=database.url(name),
        strategy=None if strategy in {"engine", "auto"} else strategy,
        brings_engine=strategy == "engine",
        settings={"imports": ["scripts.prefork_tasks"], "worker_pool_restarts": True},
        arguments=arguments,
        environment={"FORKS_USE": "import,worker_init,ready"} | options.pop("environment", {}),
        **options,
    )
    with workers.running(worker):
        yield worker
    databases.assert_no_connections(database, name)


def work(worker: workers.Worker, key: str, count: int, parties: int = 0) -> list[dict[str, Any]]:
    """Let the worker run `count` tasks at once; check each one's result, return what they report."""
    outcomes = worker.call_together("work", [(key, f"task {number}", parties) for number in range(count)])
    assert [outcome.state for outcome in outcomes] == ["SUCCESS"] * count, outcomes
    reports = [outcome.value for outcome in outcomes]
    assert [report["note"] for report in reports] == [f"task {number}" for number in range(count)]
    return reports


def written(count: int) -> list[str]:
    return sorted(f"task {number} {part}" for number in range(count) for part in ("first", "second"))


def assert_one_connection_each(reports: list[dict[str, Any]]) -> None:
    """Each pool process has one connection to the server, and shares it with none; on_engine's listener was there."""
    backends: dict[int, set[int]] = {}
    for report in reports:
        backends.setdefault(report["pid"], set()).update(report["backends"])
        assert report["listener"] == report["pid"], "on_engine did not reach the connection of this pool process"
    assert all(len(of_one) == 1 for of_one in backends.values()), backends
    assert len(set().union(*backends.values())) == len(backends), f"a connection is shared: {backends}"


def fleet(
    site: workers.Site, database: databases.Database, *arguments: str, **options: Any
) -> contextlib.AbstractContextManager[dict[str, workers.Worker]]:
    """Run one worker per strategy, side by side: they mostly wait for their pool processes."""
    return forking.side_by_side({name: prefork(site, database, name, *arguments, **options) for name in STRATEGIES})


def on_each(workers_: dict[str, workers.Worker], check: Callable[[workers.Worker, str], None]) -> None:
    """Run `check(worker, key)` on all workers at once, each with rows of its own."""
    with ThreadPoolExecutor(len(workers_)) as executor:
        checks = {name: executor.submit(check, worker, uuid.uuid4().hex) for name, worker in workers_.items()}
    failed = {name: one.exception() for name, one in checks.items() if one.exception() is not None}
    assert not failed, failed


def abandoned(database: databases.PostgreSQL) -> int:
    """Return how many sessions have ended without a goodbye, as those of a process that just exits do."""
    sql = "SELECT sessions_abandoned FROM pg_stat_database WHERE datname = current_database()"
    return database.column(sql)[0]


@pytest.fixture(scope="module")
def short_lived(site: workers.Site, database: databases.PostgreSQL) -> Iterator[dict[str, workers.Worker]]:
    """Workers whose pool processes run one task each."""
    with fleet(site, database, "--max-tasks-per-child=1") as running:
        yield running


def test_replaced_after_each_task(short_lived: dict[str, workers.Worker], database: databases.PostgreSQL) -> None:
    """A main process that used the Engine forks again and again; nobody shares, and it keeps no connection open."""

    def check(worker: workers.Worker, key: str) -> None:
        reports = work(worker, key, 6)
        assert len({report["pid"] for report in reports}) == 6
        assert_one_connection_each(reports)
        assert sorted(database.rows(key)) == written(6)
        # The pool processes that are alive now have run nothing.
        eventually(lambda: not database.connections(worker.name), "no connection open, the main process's included")

    on_each(short_lived, check)


@since_5_7
def test_hooks_in_the_main_process(short_lived: dict[str, workers.Worker], database: databases.PostgreSQL) -> None:
    """on_failure and an error callback of a killed task write rows in the main process, which then forks again."""

    def check(worker: workers.Worker, key: str) -> None:
        main = work(worker, uuid.uuid4().hex, 1)[0]["main"]
        errback = worker.signature("errback").set(immutable=False)
        task_id = worker.send("hung", key, time_limit=0.3, link_error=errback)
        assert worker.wait(task_id).error == "TimeLimitExceeded"
        expected = {f"errback in {main}", f"on_failure in {main}"}
        eventually(lambda: expected <= set(database.rows(key)), "the hook and the error callback have written")
        assert set(database.rows(key)) == expected
        afterwards = uuid.uuid4().hex
        assert_one_connection_each(work(worker, afterwards, 3))
        assert sorted(database.rows(afterwards)) == written(3)
        eventually(lambda: not database.connections(worker.name), "no connection open, the main process's included")

    on_each(short_lived, check)


def test_pool_restart(short_lived: dict[str, workers.Worker], database: databases.PostgreSQL) -> None:
    """After `pool_restart` the new pool processes have connections of their own."""

    def check(worker: workers.Worker, key: str) -> None:
        main = psutil.Process(work(worker, uuid.uuid4().hex, 1)[0]["main"])
        before = {child.pid for child in main.children()}
        assert worker.call("restart_pool").state == "SUCCESS"
        eventually(lambda: not before & {child.pid for child in main.children()}, "the worker pool restarts")
        assert_one_connection_each(work(worker, key, 2))
        assert sorted(database.rows(key)) == written(2)

    on_each(short_lived, check)


def test_autoscale(site: workers.Site, database: databases.PostgreSQL) -> None:
    """Pool processes that autoscale forks while others work have connections of their own, and keep them."""

    def check(worker: workers.Worker, key: str) -> None:
        first = work(worker, uuid.uuid4().hex, 1)
        together = work(worker, key, 4, parties=4)
        assert len({report["pid"] for report in together}) == 4
        reports = [*first, *together, *work(worker, uuid.uuid4().hex, 8)]
        assert_one_connection_each(reports)
        assert sorted(database.rows(key)) == written(4)
        backends = {backend for report in reports for backend in report["backends"]}
        listed = {connection.pid for connection in database.connections(worker.name)}
        assert listed <= backends, "the main process keeps a connection open"

    before = abandoned(database)
    with fleet(site, database, pool_arguments=["-P", "prefork", "--autoscale=4,1"]) as running:
        on_each(running, check)
    assert abandoned(database) == before, "pool processes have not closed their connections at shutdown"


@since_5_7
def test_spawn(site: workers.Site, database: databases.PostgreSQL) -> None:
    """Spawned pool processes, which inherit nothing, find their strategy and have a connection of their own each."""

    def check(worker: workers.Worker, key: str) -> None:
        reports = work(worker, key, 2, parties=2) + work(worker, uuid.uuid4().hex, 4)
        assert len({report["pid"] for report in reports}) == 2
        assert_one_connection_each(reports)
        assert sorted(database.rows(key)) == written(2)
        assert {report["strategy"] for report in worker.probe()} == {worker.strategy or "per_process"}
        processes = worker.inspect("sessions")["processes"]
        assert {process["pid"] for process in processes} == {report["pid"] for report in reports}

    with fleet(site, database, "--pool-start-method=spawn") as running:
        on_each(running, check)


def test_transaction_of_the_main_process(site: workers.Site, database: databases.PostgreSQL, key: str) -> None:
    """A transaction that the main process holds while it forks survives children that lay hands on it."""
    held = uuid.uuid4().hex
    with prefork(site, database, "local", "--max-tasks-per-child=1", environment={"FORKS_HOLD": held}) as worker:
        outcomes = [worker.call("let_go", key) for _ in range(3)]
        assert [outcome.state for outcome in outcomes] == ["SUCCESS"] * 3, outcomes
        assert database.rows(held) == []
    assert database.rows(key) == ["child"] * 3
    assert database.rows(held) == ["main process"]
