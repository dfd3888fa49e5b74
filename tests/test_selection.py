"""Which strategy a worker has, who chose it, and what the worker says about it."""

import contextlib
import json
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from celery import VERSION as CELERY_VERSION
from support.databases import PostgreSQL, assert_no_connections
from support.worker import Site, Worker, running, start_process

AUTO = {"prefork": "per_process", "threads": "scoped", "gevent": "scoped", "eventlet": "scoped", "solo": "local"}
Start = Callable[..., AbstractContextManager[Worker]]


@pytest.fixture
def start(site: Site, database: PostgreSQL) -> Start:
    """Start a worker whose strategy nobody has chosen, run the recipe in it, and see that it leaves no connection."""

    @contextlib.contextmanager
    def start(pool: str = "solo", **options: Any) -> Iterator[Worker]:
        name = f"{site.prefix[:-1]}-selection-{uuid.uuid4().hex[:6]}"
        with running(Worker(site, name, pool, database_url=database.url(name), **options)) as worker:
            outcomes = worker.call_together("create", [(uuid.uuid4().hex,) for _ in range(4)])
            assert [outcome.state for outcome in outcomes] == ["SUCCESS"] * 4, outcomes
            yield worker
        assert_no_connections(database, name)

    return start


def announcement(worker: Worker) -> str:
    """Return the one line that tells what the worker will do."""
    lines = [line for line in worker.log().splitlines() if "celery-alchemy" in line and "strategy" in line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("pool", AUTO)
def test_auto_follows_the_worker_pool_and_says_so(start: Start, pool: str) -> None:
    """One log line names strategy, reason, connection pool and the most connections; `db.strategy` tells the same."""
    with start(pool) as worker:
        for report in worker.probe():
            assert (report["strategy"], report["worker_pool"]) == (AUTO[pool], pool)
            assert "auto" in report["reason"]
            line = announcement(worker)
            for part in (pool, AUTO[pool], report["reason"], "Pool"):
                assert part in line
            assert re.search(rf"\b{report['max_connections']} connections", line)


def test_the_worker_pool_is_read_off_the_worker_not_off_the_setting(start: Start) -> None:
    """`conf.worker_pool` says solo, the command line threads."""
    with start("threads", settings={"worker_pool": "solo"}) as worker:
        assert worker.probe()[0]["worker_pool"] == "threads"
        assert worker.probe()[0]["strategy"] == "scoped"


def test_a_dict_names_a_strategy_per_worker_pool(start: Start) -> None:
    with start(
        "threads", settings={"alchemy_session_strategy": {"threads": "per_process", "solo": "scoped"}}
    ) as worker:
        assert worker.probe()[0]["strategy"] == "per_process"


def test_a_worker_pool_that_the_dict_does_not_name_is_left_to_auto(start: Start) -> None:
    with start("solo", settings={"alchemy_session_strategy": {"threads": "per_process"}}) as worker:
        assert worker.probe()[0]["strategy"] == "local"
        assert "auto" in worker.probe()[0]["reason"]


def test_a_strategy_may_be_a_class_of_the_users(start: Start) -> None:
    setting = "support.project.strategies:HouseStrategy"
    with start("prefork", settings={"alchemy_session_strategy": setting}) as worker:
        assert {report["strategy"] for report in worker.probe()} == {"house"}
        assert "house" in announcement(worker)


def test_a_third_party_registers_a_name_as_an_entry_point(start: Start, tmp_path: Path) -> None:
    metadata = tmp_path / "house-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: house\nVersion: 1.0\n")
    entry = "[celery_alchemy.strategies]\nbrownstone = support.project.strategies:HouseStrategy\n"
    (metadata / "entry_points.txt").write_text(entry)
    environment = {"PYTHONPATH": str(tmp_path)}
    with start("solo", settings={"alchemy_session_strategy": "brownstone"}, environment=environment) as worker:
        assert worker.probe()[0]["strategy"] == "house"


def test_the_command_line_overrides_the_setting(start: Start) -> None:
    with start("solo", strategy="local", arguments=["--session-strategy", "scoped"]) as worker:
        report = worker.probe()[0]
        assert report["strategy"] == "scoped"
        assert "--session-strategy" in report["reason"]
        assert "--session-strategy" in announcement(worker)


@pytest.mark.skipif(CELERY_VERSION < (5, 7), reason="Celery before 5.7 has no --pool-start-method")
@pytest.mark.parametrize("arguments", [[], ["--session-strategy", "local"]], ids=["auto", "command-line"])
def test_the_choice_reaches_spawned_pool_processes(start: Start, arguments: list[str]) -> None:
    """They are fresh interpreters, which see no command line."""
    expected = arguments[-1] if arguments else "per_process"
    with start("prefork", arguments=["--pool-start-method", "spawn", *arguments]) as worker:
        reports = worker.probe()
        assert {report["strategy"] for report in reports} == {expected}
        assert {report["worker_pool"] for report in reports} == {"prefork"}
        assert len({report["pid"] for report in reports}) == 2


def test_under_autoscale_the_upper_end_counts(start: Start) -> None:
    with start("prefork", pool_arguments=["--autoscale=3,1"], concurrency=1) as worker:
        announced = worker.probe()[0]["max_connections"]
        line = announcement(worker)
    with start("prefork", concurrency=3) as worker:
        assert worker.probe()[0]["max_connections"] == announced
    assert f"{announced} connections" in line


@pytest.mark.parametrize("how", ["environment", "setting"])
@pytest.mark.parametrize(("pool", "expected"), [("Threads", "scoped"), ("House", "local")])
def test_a_custom_pool_class_is_served(start: Start, database: PostgreSQL, how: str, pool: str, expected: str) -> None:
    """One built on Celery's threads like threads, one of its own kind by `local`; neither shares a Session."""
    where = f"support.project.pools:{pool}"
    if how == "environment":
        options: dict[str, Any] = {"own": True, "environment": {"CELERY_CUSTOM_WORKER_POOL": where}}
        options["pool_arguments"] = ["-P", "custom", "-c", "3"]
    else:
        options = {"settings": {"worker_pool": where}, "pool_arguments": ["-c", "3"]}
    with start("custom", concurrency=3, **options) as worker:
        key = uuid.uuid4().hex
        assert worker.probe()[0]["strategy"] == expected
        assert f"strategy {expected}" in announcement(worker)
        outcomes = worker.call_together("meet", [(key, 3)] * 3)
        assert all(outcome.value["same"] and outcome.value["own rows only"] for outcome in outcomes), outcomes
        assert len({outcome.value["session"] for outcome in outcomes}) == 3


@pytest.mark.parametrize("strategy", ["local", "scoped", "per_process"])
def test_an_engine_of_the_users_is_kept(start: Start, strategy: str) -> None:
    """It was used before the fork; its object and its listeners stay, its connections do not cross."""
    with start("prefork", strategy=strategy, brings_engine=True) as worker:
        for report in worker.probe():
            assert report["engine is the user's"]
        outcomes = worker.call_together("set_by_listener", [()] * 4)
        assert [outcome.value for outcome in outcomes] == ["was here"] * 4, outcomes
        key = uuid.uuid4().hex
        outcomes = worker.call_together("meet", [(key, 2)] * 2)
        assert len({outcome.value["backend"] for outcome in outcomes}) == 2


@pytest.mark.parametrize(("pool", "expected"), [("solo", "local"), ("threads", "scoped")])
def test_an_embedded_worker_is_a_worker(tmp_path: Path, pool: str, expected: str) -> None:
    """celery.contrib.testing.worker.start_worker, which has no command line and sends few signals."""
    log = tmp_path / "log"
    script = Path(__file__).parent / "scripts" / "embedded_worker.py"
    process = start_process([sys.executable, str(script), pool, f"sqlite:///{tmp_path}/test.db"], log, {})
    try:
        assert process.wait(60) == 0, log.read_text()
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(log.read_text()) from None
    report = json.loads(log.read_text().splitlines()[-1])
    assert report == {"strategy": expected, "worker_pool": pool, "rows": 3}
