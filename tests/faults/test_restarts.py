"""A PostgreSQL server that is restarted, and one that crashes: no idle connection fails a task."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest
from support import databases
from support.databases import PostgreSQL
from support.faults import amount
from support.fleet import fleet
from support.worker import Site

from celery_alchemy.loadtests.errors import ServiceError
from celery_alchemy.loadtests.services.rundir import run_directory
from celery_alchemy.loadtests.services.servers import PostgreSQLServer

GONE_S = amount(1, 30)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQLServer]:
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(run_directory())
        try:
            server = stack.enter_context(PostgreSQLServer(run))
        except ServiceError as error:
            pytest.skip(str(error))
        yield server


@pytest.fixture(scope="module")
def database(server: PostgreSQLServer, run_name: str) -> Iterator[PostgreSQL]:
    with databases.new_postgresql(server.url, f"{run_name}_restarts") as database:
        yield database


@pytest.mark.timeout(240)
def test_a_restart_and_a_crash(site: Site, server: PostgreSQLServer, database: PostgreSQL, key: str) -> None:
    """One set of workers, of all worker pools, for both."""
    with fleet(site, database, key) as workers:
        database.engine.dispose()
        server.stop()
        server.start()
        workers.nobody_notices(f"{key}-idle")

        with workers.all_busy(f"{key}-busy") as ids:
            database.engine.dispose()
            server.stop()
            time.sleep(GONE_S)
            server.start()
        workers.all_get_through(f"{key}-busy", ids)

        # A backend that crashes takes all the others with it, and what they had just committed: no gate may open then.
        with workers.all_busy(f"{key}-crash", seconds=6) as ids:
            victim = workers.busy(workers.workers[0])[0]
            database.engine.dispose()
            os.kill(victim, signal.SIGKILL)
        workers.all_get_through(f"{key}-crash", ids)
