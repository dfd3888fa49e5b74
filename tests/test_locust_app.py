"""`locust --app ... --task ...`: somebody's own app and its running worker, which stays as it was."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from support import locusts
from support.waiting import eventually

from celery_alchemy.loadtests.services.guard import with_package
from celery_alchemy.loadtests.services.rundir import run_directory
from celery_alchemy.loadtests.services.servers import ValkeyServer
from celery_alchemy.loadtests.tasks.replies import redis_url

SHOP = """
import os
from celery import Celery

app = Celery("shop", broker=os.environ["SHOP_BROKER"])
app.conf.task_routes = {"shop.*": {"queue": "orders"}}

@app.task
def import_order(number, *, fail=False):
    if fail:
        raise LookupError(f"no order {number}")

@app.task(bind=True, default_retry_delay=0)
def import_twice(self, number):
    if not self.request.retries:
        raise self.retry(countdown=0)
"""


class Shop:
    """An app in a directory of its own, and how to reach its broker."""

    def __init__(self, directory: Path, broker_url: str) -> None:
        self.directory, self.broker_url = directory, broker_url
        self.environ = {"SHOP_BROKER": broker_url}
        self.app: Any = Celery("watcher", broker=broker_url, set_as_current=False)

    @contextmanager
    def worker(self, *arguments: str, **environ: str) -> Iterator[None]:
        with (self.directory / "worker.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "shop", "worker", "-Q", "orders", "-P", "threads", "-c", "2",
                 "--without-gossip", "--without-mingle", *arguments],
                cwd=self.directory,
                env={**with_package(os.environ), **self.environ, **environ},
                stdout=log,
                stderr=log,
            )  # fmt: skip
        try:
            eventually(lambda: self.app.control.ping(timeout=0.5), "the shop's worker answers", within_s=30)
            yield
        finally:
            process.terminate()
            process.wait(20)

    def sends_events(self) -> bool:
        [answer] = self.app.control.enable_events(reply=True, timeout=5, limit=1)
        [reply] = answer.values()
        return bool(reply["ok"] == "task events already enabled")

    def locust(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        where = ("-f", str(locusts.LOCUSTFILE), "--headless", "--only-summary", "-u", "2", "-r", "2", "-t", "2s")
        return locusts.locust(*where, "--app", "shop:app", *arguments, cwd=self.directory, env=self.environ)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    directory = tmp_path_factory.mktemp("shop")
    (directory / "shop.py").write_text(SHOP)
    with run_directory() as run, ValkeyServer(run) as server:
        found = Shop(directory, server.url)
        yield found
        found.app.close()


def test_events_are_switched_on_for_the_run_and_off_again(shop: Shop) -> None:
    with shop.worker():
        done = shop.locust("--task", "shop.import_order", "--args", "[1]", "--fail-ratio", "0")
        assert done.returncode == 0, done.stdout
        assert "Task events were switched on for this run: celery@" in done.stdout
        assert "shop.import_order latency" in done.stdout
        assert "shop.import_order queue" in done.stdout
        # Events do not tell of the database.
        assert "shop.import_order database" not in done.stdout
        assert "; 0 unanswered." in done.stdout
        assert not shop.sends_events()


def test_events_that_were_on_stay_on(shop: Shop) -> None:
    with shop.worker("-E"):
        done = shop.locust("--task", "shop.import_twice", "--args", "[1]", "--rate", "20", "--fail-ratio", "0")
        assert done.returncode == 0, done.stdout
        assert "switched on" not in done.stdout
        assert shop.sends_events()


def test_failures_come_back_with_their_class(shop: Shop) -> None:
    with shop.worker():
        done = shop.locust("--task", "shop.import_order", "--args", "[1]", "--kwargs", '{"fail": true}')
        assert done.returncode == 1, done.stdout
        assert "TaskFailed('LookupError: 'no order N'')" in done.stdout.replace('"', "'")
        assert done.stdout.count("shop.import_order: TaskFailed") == 1


def test_a_worker_that_has_loaded_the_replies_needs_no_events(shop: Shop) -> None:
    reply_url = redis_url(shop.broker_url)
    assert reply_url is not None
    loaded = ("-I", "celery_alchemy.loadtests.reporting")
    with shop.worker(*loaded, LOADTEST_REPLY_URL=reply_url):
        done = shop.locust("--task", "shop.import_twice", "--args", "[1]", "--replies", "list", "--fail-ratio", "0")
        assert done.returncode == 0, done.stdout
        assert "switched on" not in done.stdout
        assert "; 0 unanswered." in done.stdout


def test_an_unknown_task_is_refused_with_what_the_worker_knows(shop: Shop) -> None:
    with shop.worker():
        done = shop.locust("--task", "shop.import_oder")
        assert done.returncode == 2
        assert (
            "--task: no worker of shop:app knows 'shop.import_oder'. Did you mean 'shop.import_order'?" in done.stdout
        )


def test_without_a_worker_the_run_is_refused(shop: Shop) -> None:
    done = shop.locust("--task", "shop.import_order")
    assert done.returncode == 2
    assert "No worker of shop:app answered within 3 s" in done.stdout
