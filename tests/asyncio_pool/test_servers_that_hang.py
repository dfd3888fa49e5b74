"""A result backend or a broker that hangs or refuses stops one task at most: the event loop goes on."""

import functools
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import make_url
from support import servers
from support.databases import PostgreSQL
from support.silent_broker import SilentBroker
from support.waiting import eventually
from support.worker import Site, Worker, running

from celery_alchemy.loadtests.services.proxy import Proxy


@pytest.fixture(params=["silent", "refusing"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    server = SilentBroker()
    if request.param == "refusing":
        server.hang_up()
    yield f"{server.url}/0"
    if request.param == "silent":
        server.hang_up()


@pytest.fixture
def name(site: Site, key: str) -> str:
    return f"{site.prefix[:-1]}-hanging-{key[:6]}"


def test_a_result_backend_that_hangs(
    name: str, site: Site, run_database: PostgreSQL, key: str, backend: str, request: pytest.FixtureRequest
) -> None:
    settings: dict[str, Any] = {
        "redis_socket_timeout": 3.0,
        "redis_socket_connect_timeout": 3.0,
        "redis_retry_on_timeout": False,
        "result_backend_max_retries": 0,
        "result_backend_transport_options": {"retry_policy": {"max_retries": 1, "interval_start": 0}},
    }
    url = run_database.url(name)
    with running(
        Worker(
            site, name, "asyncio", database_url=url, concurrency=40, broker_url=servers.rabbitmq(), own=True,
            result_backend=backend, settings=settings, modules=("auditing", "coroutines"),
        )
    ) as worker:  # fmt: skip
        worker.send_only("heartbeat", key, 6.0, task_id=f"{key}-beat")
        stored = [worker.send("add", number, 1) for number in range(20)]
        failed = [worker.send("fail", "so it is") for _ in range(3)]
        soft = worker.send("sleep", f"{key}-soft", 60, soft_time_limit=0.5)
        hard = worker.send("sleep", f"{key}-hard", 60, time_limit=0.5)
        assert len([*stored, *failed, soft, hard]) == 25

        def notes(of: str) -> list[str]:
            return [one["note"] for one in worker.said(of)]

        seen: dict[str, list[str]] = {"soft": [], "hard": []}

        def all_seen() -> bool:
            for one in seen:
                seen[one] += notes(f"{key}-{one}")
            return seen == {"soft": ["begun", "soft limit"], "hard": ["begun", "cancelled"]}

        eventually(all_seen, "both limits strike")
        say_how_silent(worker, key)
        assert_nothing_blocked(worker, key)
        # No message is left unacknowledged, though no result could be stored.
        eventually(lambda: worker.inspect("active") == [] and worker.inspect("reserved") == [], "nothing runs")
        began = time.monotonic()
        worker.end(signal.SIGTERM)
        assert time.monotonic() - began < 30
    assert given_back(worker) == []


def say_how_silent(worker: Worker, key: str) -> None:
    """The loop goes on: a coroutine of it has ended. What it watches is a time, which depends on the machine and on the
    hook that looks for calls that block."""
    ((silent_s, beside_s),) = eventually(lambda: worker.said(key), "the loop has been watched")
    print(f"the loop was silent for {silent_s} s at most, a thread beside it for {beside_s} s")


def assert_nothing_blocked(worker: Worker, key: str) -> None:
    """No call that may block was made in the loop's thread, so no server can make it wait; one that is, is noted."""
    for number, expected in enumerate([False, True]):
        worker.send_only("say_what_blocked", f"{key}-blocked-{number}", task_id=f"{key}-say-{number}")
        (blocked,) = eventually(functools.partial(worker.said, f"{key}-blocked-{number}"), "what blocked is known")
        assert any("block_on_socket" in one for one in blocked) is expected
        assert [one for one in blocked if "block_on_socket" not in one] == []
        worker.send_only("block_on_socket", task_id=f"{key}-block-{number}")


def given_back(worker: Worker) -> list[str]:
    """The tasks whose messages are in the worker's queue again, or still; but for those that only wake a worker."""
    found = []
    with Celery("look", broker=worker.broker_url).connection_for_write() as connection, connection.channel() as channel:
        while message := channel.basic_get(worker.queue, no_ack=True):
            found.append(message.headers["task"])
    return [task for task in found if task != "untouched"]


def test_a_broker_that_hangs_while_tasks_publish(name: str, site: Site, run_database: PostgreSQL, key: str) -> None:
    """`apply_async` in coroutines, retries and chains wait for the broker, and stop no other task."""
    address = make_url(servers.rabbitmq())
    with Proxy(address) as proxy:
        settings = {"broker_pool_limit": 2, "broker_transport_options": {"confirm_publish": True}}
        url = address.set(port=proxy.port).render_as_string(hide_password=False)
        with running(
            Worker(
                site, name, "asyncio", database_url=run_database.url(name), concurrency=40, own=True,
                broker_url=servers.rabbitmq(), own_broker_url=url, settings=settings,
                modules=("auditing", "coroutines"),
            )
        ) as worker:  # fmt: skip
            assert worker.call("send", 3).value == 3
            worker.send_only("heartbeat", key, 5.0, task_id=f"{key}-beat")
            sending = [worker.send("send_when_told", key, 20) for _ in range(10)]
            eventually(lambda: len(worker.inspect("active")) == 11, "all run")
            proxy.fall_silent()
            site.redis.set(site.key("go", key), 1, ex=60)
            say_how_silent(worker, key)
            assert len(sending) == 10
            proxy.cut()
            proxy.recover()
            assert_nothing_blocked(worker, key)  # now that the worker gets messages again
            worker.end(signal.SIGQUIT)
