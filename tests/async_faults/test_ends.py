"""Async tasks that are ended from outside, wherever they are in their transaction: Redis and RabbitMQ."""

import json
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from support import servers
from support.databases import PostgreSQL, assert_no_connections, assert_not_busy
from support.waiting import eventually
from support.worker import Site, Worker, running

Make = Callable[..., Worker]


@pytest.fixture(params=["redis", "rabbitmq"])
def make(
    request: pytest.FixtureRequest, site: Site, slow_commits: PostgreSQL, few_connections: dict[str, Any], key: str
) -> Make:
    """Makes workers of one queue, with eight connections."""
    broker_url = servers.rabbitmq() if request.param == "rabbitmq" else ""

    def make(concurrency: int, **more: Any) -> Worker:
        name = f"{site.prefix[:-1]}-ends-{key[:6]}"
        settings = {"alchemy_engine_options": few_connections}
        return Worker(
            site, name, "asyncio", database_url=slow_commits.url(name), concurrency=concurrency, settings=settings,
            modules=["trials", "ends"], awaits=True, broker_url=broker_url, own=True, **more,
        )  # fmt: skip

    return make


def stored(site: Site, task_id: str) -> str:
    """The state that the result backend has of a task."""
    text = site.redis.get(f"{site.prefix}celery-task-meta-{task_id}")
    return str(json.loads(text or "{}").get("status", ""))


def begun(worker: Worker, key: str, count: int, what: str = "begun") -> None:
    found: list[Any] = []

    def all_said() -> bool:
        found.extend(worker.said(key))
        return found.count(what) >= count

    eventually(all_said, f"{count} have said {what!r}")


def assert_unharmed(worker: Worker, database: PostgreSQL) -> None:
    assert_not_busy(database, worker.name)
    assert {report["checkedout"] for report in worker.probe()} == {0}


@pytest.mark.parametrize("where", ["connection", "statement", "thread", "pause", "commit"])
def test_a_task_is_revoked(make: Make, site: Site, slow_commits: PostgreSQL, key: str, where: str) -> None:
    """Nothing of it is left on the server; a COMMIT that has begun is waited for."""
    with running(make(20)) as worker:
        holders = [worker.send("wait_in", f"{key}-holder", "pause") for _ in range(8 if where == "connection" else 0)]
        begun(worker, f"{key}-holder", len(holders))
        ids = [worker.send("wait_in", key, where) for _ in range(6)]
        begun(worker, key, 6, "before the COMMIT" if where == "commit" else "begun")
        worker.control("revoke", task_id=ids, terminate=True)
        eventually(lambda: {stored(site, one) for one in ids} == {"REVOKED"}, "all are REVOKED")
        eventually(lambda: len(worker.inspect("active")) == len(holders), "none is active")
        worker.control("revoke", task_id=holders, terminate=True)
        eventually(lambda: worker.inspect("active") == [], "no holder is active")
        assert_unharmed(worker, slow_commits)
        rows = Counter(slow_commits.rows(key))
        assert rows == ({} if where != "commit" else {"of the task": 6, "committed slowly": 6})
        assert worker.call("insert", key).state == "SUCCESS"
    assert_no_connections(slow_commits, worker.name)


def test_clean_up_code_may_await(make: Make, slow_commits: PostgreSQL, key: str) -> None:
    with running(make(20)) as worker:
        ids = [worker.send("clean_up", key, 0.3) for _ in range(6)]
        begun(worker, key, 6)
        worker.control("revoke", task_id=ids, terminate=True)
        begun(worker, key, 6, "cleaned up")
        eventually(lambda: worker.inspect("active") == [], "none is active")
        assert_unharmed(worker, slow_commits)
        assert slow_commits.rows(key) == []


@pytest.mark.parametrize("times", [1, 2])
def test_a_warm_shutdown_commits_what_runs(make: Make, slow_commits: PostgreSQL, key: str, times: int) -> None:
    """Six are in their COMMIT, which takes a second; what waits for a slot goes to the next worker."""
    worker = make(6)
    with running(worker):
        for _ in range(18):
            worker.send("wait_in", key, "commit")
        begun(worker, key, 6, "before the COMMIT")
        for _ in range(times - 1):
            worker.signal(signal.SIGTERM)
        assert worker.end(signal.SIGTERM) == 0
        assert_no_connections(slow_commits, worker.name)
        counts = Counter(slow_commits.rows(key))
        assert counts["of the task"] == counts["committed slowly"] >= 6
    with running(make(6)) as worker:
        expected = {"of the task": 18, "committed slowly": 18}
        eventually(lambda: Counter(slow_commits.rows(key)) == expected, "all are done, and once")
        assert worker.call("insert", f"{key}-after").state == "SUCCESS"
        assert Counter(slow_commits.rows(key)) == expected


@pytest.mark.parametrize("where", ["statement", "pause", "thread"])
def test_a_cold_shutdown_rolls_back(make: Make, slow_commits: PostgreSQL, key: str, where: str) -> None:
    """The tasks are delivered again, each once."""
    worker = make(8)
    with running(worker):
        for _ in range(6):
            worker.send("wait_in", key, where)
        begun(worker, key, 6)
        worker.end(signal.SIGQUIT)
        assert_no_connections(slow_commits, worker.name)
        assert slow_commits.rows(key) == []
    with running(make(8)) as worker:
        begun(worker, key, 6)
        assert worker.end(signal.SIGQUIT) is not None
    assert_no_connections(slow_commits, worker.name)
