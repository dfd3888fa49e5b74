"""Workers that get the same message twice: one effect, equal results, no failure, in both spellings of the tasks."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from support.databases import PostgreSQL, assert_no_connections, assert_not_busy
from support.waiting import eventually
from support.worker import Site, Worker, running

COPIES = 3
MODES = ["once_first", "once_last"]


@pytest.fixture(
    scope="module",
    params=["await asyncio", "await prefork", "await threads", "await solo", "def asyncio", "def prefork"],
)
def worker(request: pytest.FixtureRequest, site: Site, run_database: PostgreSQL) -> Iterator[Worker]:
    spelling, pool = request.param.split()
    name = f"{site.prefix[:-1]}-once-{pool}-{uuid.uuid4().hex[:6]}"
    url = run_database.url(name)
    modules = ("endings", "once")
    worker = Worker(site, name, pool, database_url=url, awaits=spelling == "await", modules=modules)
    with running(worker):
        yield worker
    assert_no_connections(run_database, worker.name)


def endings(worker: Worker, task_id: str, states: int) -> list[dict[str, Any]]:
    """Wait until so many deliveries have succeeded or failed; return how each has."""

    def told() -> list[dict[str, Any]]:
        records = map(json.loads, worker.site.redis.lrange(worker.site.key("task", task_id), 0, -1))
        return [record for record in records if "state" in record]

    eventually(lambda: len(told()) >= states, f"{states} copies of {task_id} have ended")
    return told()


def deliver(worker: Worker, task: str, *args: object, **options: object) -> list[dict[str, Any]]:
    """Send copies of one message; return how each has ended."""
    task_id = uuid.uuid4().hex
    for _ in range(COPIES):
        worker.send(task, *args, task_id=task_id, **options)
    return endings(worker, task_id, COPIES)


@pytest.mark.parametrize("task", MODES)
def test_copies_have_one_effect(worker: Worker, run_database: PostgreSQL, task: str) -> None:
    keys = [uuid.uuid4().hex for _ in range(5)]
    for key in keys:
        ended = deliver(worker, task, key, 0.02)
        assert [one["state"] for one in ended] == ["SUCCESS"] * COPIES, ended
        assert len({one["value"] for one in ended}) == 1
        assert run_database.rows(key) == [task]
    assert_not_busy(run_database, worker.name)


def test_a_soft_limit_strikes_a_copy_that_waits(worker: Worker, run_database: PostgreSQL, key: str) -> None:
    """Its message goes back, and it ends as the other one does."""
    if worker.pool in {"threads", "solo"} or (worker.pool == "asyncio" and not worker.awaits):
        pytest.skip("no soft limits, or no two tasks at a time")
    task_id = worker.send("once_first", key, 3.0)
    eventually(lambda: worker.said(key) == ["begun"], "the first copy has begun")
    worker.send("once_first", key, 3.0, task_id=task_id, soft_time_limit=1)
    ended = endings(worker, task_id, 2)
    assert [one["state"] for one in ended] == ["SUCCESS"] * 2, ended
    assert "waiting for that has ended: SoftTimeLimitExceeded" in worker.log()
    assert run_database.rows(key) == ["once_first"]
