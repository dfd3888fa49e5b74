"""Workers of apps with `async def` tasks: what they say at start, what stops them, and time limits anywhere."""

import random
import uuid
from typing import Any

import pytest
from sqlalchemy import make_url
from support.databases import PostgreSQL, assert_no_connections, assert_not_busy
from support.waiting import eventually
from support.worker import Site, Worker, running

RUNS = 60


def worker_of(site: Site, database: PostgreSQL, pool: str, driver: str = "psycopg", **options: Any) -> Worker:
    name = f"{site.prefix[:-1]}-async-{pool}-{uuid.uuid4().hex[:6]}"
    return Worker(site, name, pool, database_url=database.url(name, driver), **options)


@pytest.mark.parametrize(("pool", "most"), [("prefork", 6), ("threads", 8), ("solo", 2)])
def test_the_strategy_of_coroutines_is_a_line_of_its_own(
    site: Site, database: PostgreSQL, pool: str, most: int
) -> None:
    with running(worker_of(site, database, pool, awaits=True)) as worker:
        [line] = [line for line in worker.log().splitlines() if "per_loop" in line]
        assert "one event loop per process" in line
        assert "auto: an AsyncEngine belongs to one event loop" in line
        assert f"at most {most} connections" in line


def test_connections_that_only_read_are_counted(site: Site, database: PostgreSQL) -> None:
    """Once more those of the coroutines: as many for tasks with `read_only` as for others."""
    with running(worker_of(site, database, "solo", awaits=True, modules=("endings", "reading"))) as worker:
        [line] = [line for line in worker.log().splitlines() if "per_loop" in line]
        assert "and as much for read-only tasks" in line
        assert "at most 4 connections" in line


def test_a_driver_that_can_only_be_awaited_is_announced_once(site: Site, database: PostgreSQL) -> None:
    """Ordinary tasks have no strategy of their own then."""
    worker = worker_of(site, database, "asyncio", awaits=True)
    url = make_url(worker.database_url).set(drivername="postgresql+asyncpg")
    only_awaited = url.difference_update_query(["application_name"]).render_as_string(hide_password=False)
    with running(
        worker_of(site, database, "asyncio", awaits=True, settings={"alchemy_database_url": only_awaited})
    ) as worker:
        log = worker.log().splitlines()
        [line] = [line for line in log if "per_loop" in line]
        assert "worker pool asyncio, concurrency 8" in line
        assert len([line for line in log if "`async def` tasks on the event loop of the worker pool" in line]) == 1
        assert len([line for line in log if "at most" in line]) == 1


def test_a_driver_that_cannot_be_awaited_stops_the_worker(site: Site, database: PostgreSQL) -> None:
    worker = worker_of(site, database, "threads", "psycopg2", awaits=True)
    worker.start()
    eventually(lambda: worker.exit_code() is not None, "the worker has ended")
    assert worker.stop() != 0
    assert "psycopg2 cannot be awaited; write postgresql+asyncpg or postgresql+psycopg" in worker.log()


def test_green_worker_pools_refuse_coroutines_and_run_the_others(site: Site, database: PostgreSQL, key: str) -> None:
    with running(worker_of(site, database, "gevent", awaits=True)) as worker:
        assert "--pool=asyncio" in "\n".join(worker.warnings("gevent"))
        outcome = worker.call("insert", key)
        assert (outcome.state, outcome.error) == ("FAILURE", "ConfigurationError")
        assert "--pool=asyncio" in outcome.message
        assert worker.call("plain_with_unit", key).state == "SUCCESS"
    assert database.rows(key) == ["unit of a plain task"]


def test_a_soft_limit_at_any_moment_leaves_a_row_exactly_with_success(site: Site, database: PostgreSQL) -> None:
    """Under prefork it comes as a signal, in the thread that waits for the event loop."""
    chance = random.Random(17)
    with running(worker_of(site, database, "prefork", awaits=True, concurrency=4)) as worker:
        assert worker.call("untouched").state == "SUCCESS"
        keys = [uuid.uuid4().hex for _ in range(RUNS)]
        sent = [
            worker.send("insert_slowly", key, 0.3, soft_time_limit=round(chance.uniform(0.05, 0.6), 2)) for key in keys
        ]
        outcomes = [worker.wait(task_id, or_stored=True) for task_id in sent]
        agree = [
            bool(database.rows(key)) is (outcome.state == "SUCCESS")
            for key, outcome in zip(keys, outcomes, strict=True)
        ]
        assert agree == [True] * RUNS
        struck = sum(outcome.error == "SoftTimeLimitExceeded" for outcome in outcomes)
        assert 0 < struck < RUNS, f"{struck} of {RUNS} were struck"
        assert_not_busy(database, worker.name)
        assert [report["checkedout"] for report in worker.probe()] == [0] * 4
    assert_no_connections(database, worker.name)
