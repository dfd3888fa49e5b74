"""Several databases: each has a connection pool and a strategy of its own, and no greenlet waits for another."""

import contextlib

import pytest
from support.databases import PostgreSQL
from support.several import MODULES, settings
from support.worker import Site, Worker, running


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_greenlets_that_queue_for_both(
    site: Site, run_database: PostgreSQL, there: PostgreSQL, key: str, pool: str
) -> None:
    """12 greenlets, 5 connections of each database; half of the tasks begin with one, half with the other."""
    name = f"{site.prefix[:-1]}-both-{pool}"
    few = {"alchemy_engine_options": {"pool_size": 5}} | settings(there, engine_options={"pool_size": 5})
    worker = Worker(
        site, name, pool, database_url=run_database.url(name), concurrency=12, modules=MODULES, settings=few
    )
    with running(worker):
        outcomes = worker.call_together("hold_both", [(key, ("here", "there")[number % 2]) for number in range(120)])
        assert [outcome.state for outcome in outcomes] == ["SUCCESS"] * 120, worker.log_tail()
        assert len(run_database.rows(key)) == len(there.rows(key)) == 120
        # 5 that tasks queue for, and 5 for each database that a greenlet may hold one of already; as much for reading.
        assert "QueuePool 5 + 10 reserved for nested units of work" in worker.log()
        assert "at most 60 connections to 2 databases together" in worker.log()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_each_database_has_a_strategy_and_a_size_of_its_own(
    site: Site, run_database: PostgreSQL, there: PostgreSQL, method: str, key: str
) -> None:
    name = f"{site.prefix[:-1]}-own-{method}"
    own = settings(there, session_strategy="local", engine_options={"pool_size": 3, "max_overflow": 1})
    with contextlib.ExitStack() as stack:
        worker = Worker(
            site, name, "prefork", database_url=run_database.url(name), modules=MODULES, settings=own,
            arguments=[] if method == "fork" else ["--pool-start-method", "spawn"],
        )  # fmt: skip
        stack.enter_context(running(worker))
        assert worker.call("end_both", key, "returns").state == "SUCCESS"
        found = worker.call("pools").value
        assert found["default"][0] == "per_process"
        assert found["reports"][0] == "local"
        assert found["reports"][3] == 3
        log = worker.log()
        assert "database 'default': session strategy per_process" in log
        assert "database 'reports': session strategy local (set by alchemy_session_strategy)" in log
        assert "a unit of work commits one after another: 'reports', 'default'" in log
    assert there.rows(key) == ["there"]
