"""Nothing blocks the event loop in the whole life of `async def` tasks, under each worker pool; two brokers.

Calls are counted, not times: each function in C that the loop's thread calls is looked at, and what may wait is noted.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from support import servers
from support.databases import PostgreSQL
from support.waiting import eventually
from support.worker import Site, Worker, running

WAYS = ("delay", "on commit", "canvas", "state", "join", "control", "retry", "replace", "fail")
TIMES = 3


@pytest.fixture(scope="module", params=["asyncio", "prefork", "threads", "solo"])
def pool(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module", params=["redis", "rabbitmq"])
def worker(request: pytest.FixtureRequest, pool: str, site: Site, run_database: PostgreSQL) -> Iterator[Worker]:
    """One that sends events, and has one process that runs tasks."""
    name = f"{site.prefix[:-1]}-audited-{pool}-{request.param}"
    with running(
        Worker(
            site, name, pool, database_url=run_database.url(name), own=True, arguments=("-E",),
            concurrency=1 if pool == "prefork" else None, modules=("auditing", "publishing"),
            # RabbitMQ sends the next message after an acknowledgement, which kombu's loop may hold for ten seconds.
            settings={"worker_prefetch_multiplier": 0},
            broker_url=servers.rabbitmq() if request.param == "rabbitmq" else "",
        )
    ) as worker:  # fmt: skip
        yield worker


def blocked(worker: Worker, key: str) -> list[str]:
    worker.send_only("say_what_blocked", key, task_id=f"{key}-say")
    (found,) = eventually(lambda: worker.said(key), "what blocked is known")
    return list(found)


def test_publishing_and_storing_are_taken_off_the_loop(worker: Worker, run_database: PostgreSQL, key: str) -> None:
    states: dict[str, Any] = {}
    for _ in range(TIMES):
        sent = {how: worker.send("publish", key, how) for how in WAYS}
        for how, task_id in sent.items():
            ended = {"replace": "IGNORED"}.get(how, "")
            states[how] = worker.wait(task_id, ended=ended).state
    assert states == dict.fromkeys(WAYS, "SUCCESS") | {"replace": "IGNORED", "fail": "FAILURE"}
    # What was sent along with the rest is through, too.
    eventually(lambda: run_database.rows(key).count("done") == TIMES, "what replaces has run")
    assert blocked(worker, f"{key}-first") == []
    assert worker.call("block_on_socket").state == "SUCCESS"
    assert any("block_on_socket" in one for one in blocked(worker, f"{key}-control")), "nothing would be noted"
    assert worker.call("publish_in_child").state == "SUCCESS"
    assert any(":child" in one for one in blocked(worker, f"{key}-child")), "docs/async.md says that it blocks"
