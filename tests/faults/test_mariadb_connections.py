"""MariaDB ends idle connections after `wait_timeout`, and an administrator kills the others."""

from collections.abc import Iterator

import pytest
from sqlalchemy import make_url
from support import databases, servers
from support.databases import MariaDB
from support.fleet import fleet
from support.waiting import eventually
from support.worker import Site

SOON_S = 1


class Impatient(MariaDB):
    """A server whose sessions end when they are idle for a second."""

    def url(self, worker: str) -> str:
        url = make_url(super().url(worker)).update_query_dict({"init_command": f"SET SESSION wait_timeout={SOON_S}"})
        return url.render_as_string(hide_password=False)


@pytest.fixture(scope="module")
def database(run_name: str) -> Iterator[MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_killed") as database:
        yield database


@pytest.mark.parametrize("pools", [{"prefork": 3}, {"threads": 4}, {"gevent": 8}, {"eventlet": 8}], ids="-".join)
def test_connections_that_die(site: Site, database: MariaDB, key: str, pools: dict[str, int]) -> None:
    database.engine.dispose()
    impatient = Impatient(database.engine.url)
    with fleet(site, impatient, key, pools=pools) as workers:
        (worker,) = workers.workers
        eventually(lambda: not impatient.connections(worker.name), "wait_timeout has struck")
        workers.nobody_notices(f"{key}-idle")

        with workers.all_busy(f"{key}-busy") as ids:
            for connection in workers.busy(worker):
                impatient.execute(f"KILL {connection}")
        workers.all_get_through(f"{key}-busy", ids)
    impatient.engine.dispose()
