"""Workers that end, kindly and unkindly, in the middle of statements: nothing half done, and nobody left connected.

They have no result backend: with one, Celery 5.7 wants to talk to it from the hub of gevent or eventlet when a cold
shutdown cancels a task, which fails, and then it waits for all tasks.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from support import gates
from support.databases import PostgreSQL
from support.fleet import POOLS
from support.waiting import eventually
from support.worker import Site, Worker


@contextlib.contextmanager
def busy_workers(
    site: Site, database: PostgreSQL, key: str, until: float | str, pools: Iterable[str] = POOLS, **settings: Any
) -> Iterator[dict[str, Worker]]:
    """Start a worker of each worker pool, and keep all its slots busy in a statement: for so long, or at a gate."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for pool in pools:
            concurrency = POOLS[pool]
            name = f"{site.prefix[:-1]}-{pool}-{key[:6]}"
            worker = workers[pool] = Worker(
                site,
                name,
                pool,
                database_url=database.url(name),
                concurrency=concurrency,
                settings=settings,
                silent=True,
                modules=("endings", "transient"),
            )
            stack.callback(worker.stop)
            worker.start()
        for worker in workers.values():
            worker.wait_ready()
        for worker in workers.values():
            for number in range(POOLS[worker.pool]):
                worker.send("write_once", key, f"{worker.pool} {number}", until)
        for worker in workers.values():
            eventually(lambda worker=worker: asleep(database, worker) == worker.concurrency, f"{worker.pool} is busy")
        yield workers


def asleep(database: PostgreSQL, worker: Worker) -> int:
    sleeping = [one for one in database.busy(worker.name) if "pg_sleep" in one.query]
    return len(sleeping) + len(gates.waiting(database, worker.name))


def end(workers: dict[str, Worker], *signals: int, then: Callable[[], None] = lambda: None) -> None:
    """Send the signals to all main processes, do what comes `then`, and wait until they have ended."""
    for worker in workers.values():
        for number in signals:
            os.kill(worker.pid, number)
            time.sleep(0.2)  # or the kernel delivers them as one
    for worker in workers.values():
        for _ in range(8):
            worker.send("untouched")  # one that waits for a message sees the signal seconds later
    then()
    for worker in workers.values():
        eventually(lambda worker=worker: not worker.is_running(), f"{worker.pool} has ended", within_s=60)


def assert_nobody_is_left(workers: dict[str, Worker], database: PostgreSQL) -> None:
    for worker in workers.values():
        gone = lambda worker=worker: not database.connections(worker.name)  # noqa: E731
        eventually(gone, f"{worker.pool} has left no connection")


def everything(*pools: str) -> list[str]:
    return sorted(f"{pool} {number}" for pool in pools for number in range(POOLS[pool]))


def test_warm(site: Site, run_database: PostgreSQL, key: str) -> None:
    """Who is running may finish."""
    with (
        gates.shut(run_database, f"{key}-gate") as open_gate,
        busy_workers(site, run_database, key, f"{key}-gate") as workers,
    ):
        end(workers, signal.SIGTERM, then=open_gate)
        assert {pool: worker.exit_code() for pool, worker in workers.items()} == dict.fromkeys(POOLS, 0)
        assert_nobody_is_left(workers, run_database)
    assert sorted(run_database.rows(key)) == everything(*POOLS)


def test_cold(site: Site, run_database: PostgreSQL, key: str) -> None:
    """Who is running is ended and rolled back; but for threads, which nobody can end: Celery waits for them."""
    with busy_workers(site, run_database, key, 60, pools=POOLS.keys() - {"threads"}) as workers:
        end(workers, signal.SIGQUIT)
        assert_nobody_is_left(workers, run_database)
    assert run_database.rows(key) == []
    with (
        gates.shut(run_database, f"{key}-t-gate") as open_gate,
        busy_workers(site, run_database, f"{key}-t", f"{key}-t-gate", pools=["threads"]) as workers,
    ):
        end(workers, signal.SIGQUIT, then=open_gate)
        assert_nobody_is_left(workers, run_database)
    assert sorted(run_database.rows(f"{key}-t")) == everything("threads")


def test_soft(site: Site, run_database: PostgreSQL, key: str) -> None:
    """Who is running may finish within the time that is set; but for solo, whose one thread has to hear the signal."""
    with (
        gates.shut(run_database, f"{key}-gate") as open_gate,
        busy_workers(site, run_database, key, f"{key}-gate", worker_soft_shutdown_timeout=8) as workers,
    ):
        end(workers, signal.SIGQUIT, then=open_gate)
        assert_nobody_is_left(workers, run_database)
    assert sorted(run_database.rows(key)) == everything(*(POOLS.keys() - {"solo"}))


def test_a_main_process_that_is_killed(site: Site, run_database: PostgreSQL, key: str) -> None:
    """Its pool processes do not survive it, and the server ends what they were at."""
    with busy_workers(site, run_database, key, 60) as workers:
        end(workers, signal.SIGKILL)
        assert_nobody_is_left(workers, run_database)
    assert run_database.rows(key) == []


@pytest.mark.parametrize("strategy", ["local", "scoped", "per_process"])
def test_a_pool_process_for_every_task(site: Site, run_database: PostgreSQL, key: str, strategy: str) -> None:
    """`--max-tasks-per-child=1`: each pool process closes what it has opened before the next one comes."""
    name = f"{site.prefix[:-1]}-each-{key[:6]}"
    with contextlib.ExitStack() as stack:
        worker = Worker(
            site,
            name,
            "prefork",
            database_url=run_database.url(name),
            strategy=strategy,
            modules=("endings", "transient"),
            arguments=["--max-tasks-per-child=1"],
        )
        stack.callback(worker.stop)
        worker.start()
        worker.wait_ready()
        outcomes = worker.call_together("write_once", [(key, str(number), 0) for number in range(12)])
        assert [outcome.state for outcome in outcomes] == ["SUCCESS"] * 12
        eventually(lambda: not run_database.connections(name), "no connection is left")
        assert sorted(map(int, run_database.rows(key))) == list(range(12))
