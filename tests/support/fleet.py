"""A worker of each worker pool at once, for a fault that hits them all."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from support import gates
from support.databases import Database, assert_no_connections
from support.waiting import eventually
from support.worker import Site, Worker

POOLS = {"prefork": 3, "threads": 4, "gevent": 8, "eventlet": 8, "solo": 1}


@contextlib.contextmanager
def fleet(
    site: Site, database: Database, key: str, *, pools: Mapping[str, int] = POOLS, **options: Any
) -> Iterator["Fleet"]:
    """Start the workers, and have them connect; afterwards they stop, nothing is checked out, nobody is connected."""
    options = {"modules": ("endings", "transient"), **options}
    with contextlib.ExitStack() as stack:
        workers = []
        for pool, concurrency in pools.items():
            name = f"{site.prefix[:-1]}-{pool}-{key[:6]}"
            worker = Worker(site, name, pool, database_url=database.url(name), concurrency=concurrency, **options)
            stack.callback(worker.stop)
            worker.start()
            workers.append(worker)
        for worker in workers:
            worker.wait_ready()
        found = Fleet(workers, database)
        found.connect(key)
        yield found
        for worker in workers:
            assert {report["checkedout"] for report in worker.probe()} == {0}, worker.pool
    for worker in workers:
        assert worker.exit_code() == 0, worker.log_tail()
        assert_no_connections(database, worker.name)


class Fleet:
    """The workers of a fleet."""

    def __init__(self, workers: Sequence[Worker], database: Database) -> None:
        self.workers = workers
        self._database = database

    def connect(self, key: str) -> None:
        """Have a connection made for every task that can run at one time."""
        for worker in self.workers:
            worker.call_together("write_once", [(f"{key}-warm", worker.pool, 0.1)] * (worker.concurrency or 1))
            assert self._database.connections(worker.name), "it keeps a connection"

    def nobody_notices(self, key: str) -> None:
        """Run tasks on connections that have died while they were idle."""
        ids = {worker: [worker.send("write_once", key, worker.pool, 0) for _ in range(4)] for worker in self.workers}
        for worker, sent in ids.items():
            assert [worker.wait(task_id).state for task_id in sent] == ["SUCCESS"] * 4, worker.log_tail()
        assert len(self._database.rows(key)) == 4 * len(self.workers)

    @contextlib.contextmanager
    def all_busy(self, key: str, seconds: float | None = None) -> Iterator[dict[Worker, list[str]]]:
        """Keep every slot of every worker busy in a statement during the block, with as many tasks waiting behind.

        For so many seconds where the block is to end them all at once: a gate opens when its own connection ends.
        """
        with gates.shut(self._database, f"{key}-gate"):
            ids = {
                worker: [
                    worker.send("write_surely", key, f"{worker.pool} {number}", seconds or f"{key}-gate")
                    for number in range(2 * (worker.concurrency or 1))
                ]
                for worker in self.workers
            }
            eventually(lambda: all(len(self.busy(worker)) == worker.concurrency for worker in ids), "all are busy")
            yield ids

    def busy(self, worker: Worker) -> list[int]:
        """Return the connections of a worker that are in a statement."""
        sleeping = [one.pid for one in self._database.busy(worker.name) if "sleep" in one.query.lower()]
        return sleeping + gates.waiting(self._database, worker.name)

    def all_get_through(self, key: str, ids: dict[Worker, list[str]]) -> None:
        """Wait for all tasks: each has succeeded, and is there once."""
        for worker, sent in ids.items():
            outcomes = [worker.wait(task_id) for task_id in sent]
            assert [outcome.state for outcome in outcomes] == ["SUCCESS"] * len(sent), worker.pool
            assert max(outcome.value for outcome in outcomes) > 1, f"{worker.pool}: none was in a statement"
        expected = [f"{worker.pool} {number}" for worker, sent in ids.items() for number in range(len(sent))]
        assert sorted(self._database.rows(key)) == sorted(expected)
