"""How `--pool=asyncio` gets its name, what it refuses, and how a foreign worker pool runs the same tasks."""

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, concurrency
from support.databases import PostgreSQL
from support.waiting import eventually
from support.worker import Site, Worker, running

from celery_alchemy.workers.asyncio_pool import registering
from celery_alchemy.workers.asyncio_pool.pool import TaskPool
from celery_alchemy.workers.errors import ConfigurationError

OURS = "celery_alchemy.workers.asyncio_pool.pool:TaskPool"


def test_the_name_is_known_once_an_app_has_an_alchemy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(concurrency.ALIASES, "asyncio", raising=False)
    choice = SimpleNamespace(choices=("prefork", "solo"))
    monkeypatch.setitem(sys.modules, "celery.bin.worker", SimpleNamespace(WORKERS_POOL=choice))
    registering.register()
    registering.register()
    assert concurrency.get_implementation("asyncio") is TaskPool
    assert choice.choices == ("prefork", "solo", "asyncio")


def test_a_pool_of_celerys_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(concurrency.ALIASES, "asyncio", "celery.concurrency.solo:TaskPool")
    registering.register()
    assert concurrency.ALIASES["asyncio"] == "celery.concurrency.solo:TaskPool"


@pytest.mark.parametrize("option", ["maxtasksperchild", "max_memory_per_child"])
def test_what_replaces_pool_processes_is_refused(option: str) -> None:
    with pytest.raises(ConfigurationError, match="one process"):
        TaskPool(2, app=Celery("none", set_as_current=False), **{option: 10})


@pytest.mark.parametrize("how", ["setting", "environment"])
def test_other_ways_to_name_it(how: str, site: Site, run_database: PostgreSQL) -> None:
    name = f"{site.prefix[:-1]}-named-{how}"
    by: dict[str, Any] = {
        "setting": {"settings": {"worker_pool": "asyncio"}, "pool_arguments": ["-c", "3"]},
        "environment": {
            "environment": {"CELERY_CUSTOM_WORKER_POOL": OURS}, "pool_arguments": ["-P", "custom", "-c", "3"],
        },
    }[how]  # fmt: skip
    url = run_database.url(name)
    with running(Worker(site, name, "asyncio", database_url=url, own=True, modules=("coroutines",), **by)) as worker:
        assert worker.call("add", 2, 3).value == 5
        assert worker.inspect("stats")["pool"]["implementation"] == OURS


def test_a_foreign_worker_pool_runs_async_database_tasks(site: Site, run_database: PostgreSQL, key: str) -> None:
    """As one of Celery's own might: it knows nothing of ours, and runs each tracer in a thread."""
    name = f"{site.prefix[:-1]}-foreign"
    with running(
        Worker(
            site, name, "custom", database_url=run_database.url(name), concurrency=4, own=True, awaits=True,
            pool_arguments=["-c", "4"], settings={"worker_pool": "support.project.pools:House"}, modules=("endings",),
        )
    ) as worker:  # fmt: skip
        assert worker.call("insert", key).state == "SUCCESS"
        assert worker.call("read", key).value == ["inserted"]
        assert worker.call("fail", key).error == "Boom"
        assert len(worker.call("read", key).value) == 1


def test_the_watchdog_names_a_task(site: Site, run_database: PostgreSQL) -> None:
    name = f"{site.prefix[:-1]}-watched"
    with running(
        Worker(
            site, name, "asyncio", database_url=run_database.url(name), own=True, modules=("coroutines",),
            settings={"alchemy_warn_blocked_s": 0.5},
        )
    ) as worker:  # fmt: skip
        task_id = worker.send("block", 2.0)
        eventually(lambda: f"Task block[{task_id}] has blocked the event loop" in worker.log(), "the task is named")
        assert "time.sleep(seconds)" in worker.log()
        assert worker.wait(task_id).value == "blocked"
        eventually(lambda: "The event loop goes on" in worker.log(), "the end is told")
        time.sleep(0.6)
        assert worker.log().count("has blocked the event loop") == 1
