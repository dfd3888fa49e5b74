"""Connections that die, idle and busy: only tasks in a statement fail, and with `autoretry_for` none is lost."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from support import gates
from support.databases import PostgreSQL
from support.faults import amount
from support.waiting import eventually
from support.worker import Outcome, Start, Worker

from celery_alchemy.loadtests.services.proxy import Proxy

POOLS = {"prefork": 4, "threads": 6, "gevent": 12, "eventlet": 12, "solo": 1}
GONE_S = amount(2, 30)


@dataclass
class Place:
    """A worker, the network to its database, and the database."""

    worker: Worker
    proxy: Proxy
    database: PostgreSQL

    @property
    def together(self) -> int:
        """How many tasks run at one time."""
        assert self.worker.concurrency is not None
        return self.worker.concurrency

    def warm_up(self, key: str) -> None:
        """Have a connection made for every task that can run at one time."""
        self.write(f"{key}-warm", self.together, 0.1)

    def write(self, key: str, count: int, seconds: float = 0) -> list[Outcome]:
        return self.outcomes(self.send("write_once", key, count, seconds))

    def send(self, task: str, key: str, count: int, until: float | str) -> list[str]:
        return [self.worker.send(task, key, str(number), until) for number in range(count)]

    def outcomes(self, ids: list[str]) -> list[Outcome]:
        return [self.worker.wait(task_id) for task_id in ids]

    @contextlib.contextmanager
    def all_busy(self, task: str, key: str, count: int) -> Iterator[list[str]]:
        """Send tasks of which all that can run at one time are in a statement during the block."""
        with gates.shut(self.database, f"{key}-gate"):
            ids = self.send(task, key, count, f"{key}-gate")
            waiting = lambda: len(gates.waiting(self.database, self.worker.name)) == self.together  # noqa: E731
            eventually(waiting, "all are in a statement")
            yield ids

    def terminate(self) -> None:
        """Do what an administrator does to all sessions of this worker."""
        pids = [one.pid for one in self.database.connections(self.worker.name)]
        assert pids, "there is nothing to terminate"
        for pid in pids:
            self.database.execute("SELECT pg_terminate_backend(:pid)", pid=pid)
        left = lambda: {one.pid for one in self.database.connections(self.worker.name)}.isdisjoint(pids)  # noqa: E731
        eventually(left, "the backends are gone")


@pytest.fixture(params=POOLS)
def place(
    request: pytest.FixtureRequest, start: Start, proxy: Proxy, run_database: PostgreSQL, key: str
) -> Iterator[Place]:
    pool = request.param
    with start(pool, through=proxy, concurrency=POOLS[pool], modules=("endings", "transient")) as worker:
        place = Place(worker, proxy, run_database)
        place.warm_up(key)
        yield place
        assert {report["checkedout"] for report in worker.probe()} == {0}


def states(outcomes: list[Outcome]) -> Counter[str]:
    return Counter(outcome.error or outcome.state for outcome in outcomes)


def test_connections_that_die(place: Place, key: str) -> None:
    """One worker for all of it."""
    together = place.together

    # Idle ones: nobody notices, and nobody asks before each task.
    for end in (place.terminate, place.proxy.cut):
        end()
        eventually(lambda: not place.proxy.open, "their end has come to the worker")
        assert states(place.write(f"{key}-idle", 2 * together)) == {"SUCCESS": 2 * together}, end.__name__

    # Busy ones: who was in a statement fails, with an error that says that it passes; nobody else does.
    for end in (place.terminate, place.proxy.cut):
        busy = f"{key}-busy-{end.__name__}"
        with place.all_busy("write_once", busy, 2 * together) as ids:
            end()
        found = states(place.outcomes(ids))
        assert found == {"TransientOperationalError": together, "SUCCESS": together}, end.__name__
        assert len(place.database.rows(busy)) == together, "of those that failed there is nothing"

    # With autoretry_for none is lost, and none is there twice.
    with place.all_busy("write_surely", f"{key}-sure", 2 * together) as ids:
        place.terminate()
    outcomes = place.outcomes(ids)
    assert states(outcomes) == {"SUCCESS": 2 * together}
    assert max(outcome.value for outcome in outcomes) > 1
    assert sorted(map(int, place.database.rows(f"{key}-sure"))) == list(range(2 * together))


@pytest.mark.timeout(300 + GONE_S)
def test_a_server_that_is_gone_for_a_while(place: Place, key: str) -> None:
    """Tasks that come meanwhile are refused, come again, and are all done afterwards."""
    together = place.together
    with place.all_busy("write_surely", key, together) as ids:
        place.proxy.refuse()
        place.proxy.cut()
    failed = place.write(f"{key}-refused", together)
    assert states(failed) == {"TransientOperationalError": together}
    ids += [place.worker.send("write_surely", key, str(number), 0) for number in range(together, 2 * together)]
    time.sleep(GONE_S)
    place.proxy.recover()
    outcomes = place.outcomes(ids)
    assert states(outcomes) == {"SUCCESS": 2 * together}
    assert min(outcome.value for outcome in outcomes) > 1, "some were not in need of the server, so nothing is shown"
    assert sorted(map(int, place.database.rows(key))) == list(range(2 * together))
