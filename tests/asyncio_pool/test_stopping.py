"""What ends a task from outside under `--pool=asyncio`: revoked in each phase, the end of the worker, a lost broker."""

import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import make_url
from support import servers
from support.databases import PostgreSQL
from support.waiting import eventually
from support.worker import Site, Worker, running

from celery_alchemy.loadtests.services.proxy import Proxy

Make = Callable[..., Worker]


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest) -> str:
    return servers.rabbitmq() if request.param == "rabbitmq" else ""


@pytest.fixture
def make(site: Site, run_database: PostgreSQL, key: str, broker_url: str) -> Make:
    """Makes workers of one queue."""

    def make(concurrency: int, **more: Any) -> Worker:
        name = f"{site.prefix[:-1]}-stopping-{key[:6]}"
        more = {"broker_url": broker_url, "modules": ("coroutines",)} | more
        return Worker(
            site, name, "asyncio", database_url=run_database.url(name), concurrency=concurrency, own=True, **more
        )

    return make


class Notes:
    """What tasks have said so far."""

    def __init__(self, worker: Worker, key: str) -> None:
        self._worker, self._key = worker, key
        self.all: list[dict[str, Any]] = []

    def of(self, note: str) -> list[str]:
        self.all += self._worker.said(self._key)
        return [one["id"] for one in self.all if one["note"] == note]

    def wait_for(self, note: str, count: int) -> list[str]:
        return eventually(lambda: found if len(found := self.of(note)) >= count else [], f"{count} have {note}")


def stored(site: Site, task_id: str) -> str:
    """The state that the result backend has of a task."""
    text = site.redis.get(f"{site.prefix}celery-task-meta-{task_id}")
    return str(json.loads(text or "{}").get("status", ""))


def test_a_running_task_is_revoked(make: Make, site: Site, key: str) -> None:
    with running(make(10)) as worker:
        notes = Notes(worker, key)
        ids = [worker.send("sleep_late", key, 60) for _ in range(10)]
        notes.wait_for("begun", 10)
        worker.control("revoke", task_id=ids, terminate=True)
        assert sorted(notes.wait_for("cancelled", 10)) == sorted(ids)
        eventually(lambda: {stored(site, one) for one in ids} == {"REVOKED"}, "all are REVOKED")
        eventually(lambda: worker.inspect("active") == [], "no task is active")
        assert worker.call("add", 1, 1).value == 2
    with running(make(10)) as worker:  # nothing comes again
        assert worker.call("add", 1, 1).value == 2
        assert Notes(worker, key).of("begun") == []


@pytest.mark.parametrize("terminate", [True, False])
def test_a_task_that_waits_for_a_slot_is_revoked(make: Make, site: Site, key: str, terminate: bool) -> None:
    """With terminate=True at once; else it never begins."""
    with running(make(1, settings={"worker_prefetch_multiplier": 8})) as worker:
        notes = Notes(worker, key)
        first = worker.send("sleep", key, 60)
        notes.wait_for("begun", 1)
        ids = [worker.send("sleep_late", key, 0) for _ in range(4)]
        eventually(lambda: len(worker.inspect("reserved")) == 4, "four wait for the slot")
        worker.control("revoke", task_id=ids, terminate=terminate)
        if terminate:
            eventually(lambda: worker.inspect("reserved") == [], "none waits")
        worker.control("revoke", task_id=first, terminate=True)
        eventually(lambda: {stored(site, one) for one in [first, *ids]} == {"REVOKED"}, "all are REVOKED")
        assert worker.call("add", 1, 1).value == 2
        assert notes.of("begun") == [first]
    with running(make(2)) as worker:  # acknowledged: nothing comes again
        assert worker.call("add", 1, 1).value == 2
        assert Notes(worker, key).of("begun") == []


@pytest.mark.parametrize("times", [1, 2])
def test_a_warm_shutdown_lets_what_runs_end(make: Make, key: str, times: int) -> None:
    """A second SIGTERM changes nothing. What waited for a slot goes back, and the next worker does it."""
    worker = make(20)
    with running(worker):
        notes = Notes(worker, key)
        ids = [worker.send("sleep_late" if number % 2 else "sleep", key, 2) for number in range(60)]
        notes.wait_for("begun", 20)
        for _ in range(times - 1):
            worker.signal(signal.SIGTERM)
            time.sleep(0.3)
        assert worker.end(signal.SIGTERM) == 0
        ended = notes.of("ended")
        assert len(ended) == len(notes.of("begun")) >= 20
    with running(make(20)) as worker:
        ended = notes.wait_for("ended", 60)
        assert Counter(ended) == Counter(ids)
        assert Counter(notes.of("begun")) == Counter(ids)


def test_a_cold_shutdown_gives_back_what_is_acknowledged_late(make: Make, key: str) -> None:
    worker = make(20)
    with running(worker):
        notes = Notes(worker, key)
        late = [worker.send("sleep_late", key, 3) for _ in range(15)]
        early = [worker.send("sleep", key, 60) for _ in range(5)]
        notes.wait_for("begun", 20)
        began = time.monotonic()
        worker.end(signal.SIGQUIT)
        assert time.monotonic() - began < 20
        assert Counter(notes.of("cancelled")) == Counter(late + early)
    with running(make(20)) as worker:
        assert Counter(notes.wait_for("ended", 15)) == Counter(late)
        again = Counter(notes.of("begun")) - Counter(late + early)
        assert again == Counter(late)


def test_a_soft_shutdown_lets_short_tasks_end(make: Make, key: str) -> None:
    worker = make(4, settings={"worker_soft_shutdown_timeout": 4.0})
    with running(worker):
        notes = Notes(worker, key)
        short, long = worker.send("sleep_late", key, 2), worker.send("sleep_late", key, 60)
        notes.wait_for("begun", 2)
        worker.end(signal.SIGQUIT)
        assert (notes.of("ended"), notes.of("cancelled")) == ([short], [long])


def test_a_task_that_swallows_everything_does_not_hold_up_a_cold_shutdown(make: Make, key: str) -> None:
    worker = make(4)
    with running(worker):
        worker.send("swallow", key, 100)
        Notes(worker, key).wait_for("begun", 1)
        worker.end(signal.SIGQUIT)


def test_a_task_that_blocks_the_loop_does_not_hold_up_a_cold_shutdown(make: Make, key: str) -> None:
    worker = make(4)
    with running(worker):
        worker.send("block", 100)
        eventually(lambda: "has blocked the event loop" in worker.log(), "the watchdog warns")
        worker.end(signal.SIGQUIT)


def test_a_thread_that_a_task_waits_for_does_not_hold_up_a_cold_shutdown(make: Make, key: str) -> None:
    with running(make(4)) as worker:
        worker.send("wait_in_thread_of_loop", 100)
        worker.send("wait_in_thread", 100)
        eventually(lambda: len(worker.inspect("active")) == 2, "both run")
        worker.end(signal.SIGQUIT)


@pytest.fixture
def cuttable() -> Iterator[Proxy]:
    with Proxy(make_url(servers.rabbitmq())) as proxy:
        yield proxy


@pytest.mark.parametrize("broker_url", ["rabbitmq"], indirect=True)
@pytest.mark.parametrize("cancels", [True, False])
def test_a_lost_connection_to_the_broker(make: Make, key: str, cuttable: Proxy, cancels: bool) -> None:
    """With `worker_cancel_long_running_tasks_on_connection_loss` what runs is cancelled, and delivered again; what
    waits for a slot is dropped either way, for it is delivered again too."""
    url = make_url(servers.rabbitmq()).set(port=cuttable.port).render_as_string(hide_password=False)
    settings = {"worker_cancel_long_running_tasks_on_connection_loss": cancels, "worker_prefetch_multiplier": 4}
    with running(make(2, own_broker_url=url, settings=settings)) as worker:
        notes = Notes(worker, key)
        ids = [worker.send("sleep_late", key, 2) for _ in range(4)]
        notes.wait_for("begun", 2)
        cuttable.cut()
        notes.wait_for("ended", 4 if cancels else 6)
        time.sleep(1)
        ended, cancelled = Counter(notes.of("ended")), Counter(notes.of("cancelled"))
        assert set(ended) == set(ids)
        assert sum(cancelled.values()) == (2 if cancels else 0)
        assert Counter(notes.of("begun")) == ended + cancelled
        assert sum(ended.values()) == (4 if cancels else 6)
