"""The outbox in a storm: processes killed at random moments, a broker and a database that fail.

Every message of a committed transaction arrives at least once, with its id and in its order; none of another ever does.
"""

import contextlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import databases
from support.databases import Database
from support.faults import SEED, amount
from support.outbox_brokers import broker_place
from support.outbox_storm import Storm
from support.own_mariadb import own_mariadb

from celery_alchemy.loadtests.errors import ServiceError
from celery_alchemy.loadtests.services.rundir import run_directory
from celery_alchemy.loadtests.services.servers import PostgreSQLServer

COUNT = amount(100, 2000)
WITHIN_S = amount(240, 2400)
Restart = Callable[[random.Random], str]


@contextlib.contextmanager
def postgresql(name: str) -> Iterator[tuple[Database, Restart]]:
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(run_directory())
        try:
            server = stack.enter_context(PostgreSQLServer(run))
        except ServiceError as error:
            pytest.skip(str(error))
        database = stack.enter_context(databases.new_postgresql(server.url, name))
        # Its server is set up to forget what was committed last when it crashes.
        database.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = on')
        database.engine.dispose()

        def restart(chance: random.Random) -> str:
            found = database.connections("storm")
            if found and chance.random() < 0.5:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(found).pid, signal.SIGKILL)  # takes all the others with it
                return "crashed"
            server.stop()
            server.start()
            return "restarted"

        yield database, restart


@contextlib.contextmanager
def mariadb(name: str) -> Iterator[tuple[Database, Restart]]:
    with run_directory() as run, own_mariadb(run) as server, databases.new_mariadb(server.url, name) as database:

        def restart(chance: random.Random) -> str:
            crash = chance.random() < 0.5
            server.crash() if crash else server.stop()
            server.start()
            return "crashed" if crash else "restarted"

        yield database, restart


@pytest.fixture(scope="module", params=["postgresql", "mariadb"])
def place(request: pytest.FixtureRequest, run_name: str) -> Iterator[tuple[Database, Restart]]:
    """A database of a server of the test's own."""
    opened: Any = {"postgresql": postgresql, "mariadb": mariadb}[request.param]
    with opened(f"{run_name}_storm") as found:
        yield found


# PyMySQL leaves a socket to the collector where the server goes while it connects.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(WITHIN_S + 240)
@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_every_committed_message_arrives_and_no_other(
    place: tuple[Database, Restart], broker: str, tmp_path: Path, key: str
) -> None:
    database, restart = place
    with broker_place(broker) as there:
        storm = Storm(tmp_path, database, there, key=key, seed=SEED, restart=restart)
        verdict = storm.run(COUNT, WITHIN_S)
    print(f"CELERY_ALCHEMY_SEED={SEED}: {verdict}")
    assert verdict.ghosts == []
    assert verdict.lost == []
    assert verdict.wrong_ids == []
    assert verdict.order_broken == []
    # Redis takes a message off the list before a second command notes it as not acknowledged: what is killed or cut off
    # between them is lost, whoever has sent it.
    between = verdict.faults["worker killed"] + verdict.faults["broker connections cut"] + verdict.faults["broker away"]
    assert len(verdict.lost_in_transport) <= (between if broker == "redis" else 0)
    assert {who: count for who, count in verdict.gave_up.items() if who.startswith("sender")} == {}
    assert verdict.ended["sender"] == 0
    assert verdict.committed > COUNT / 2
    assert verdict.interrupted > COUNT / 50, "too few were killed to show anything"
