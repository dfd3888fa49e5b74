"""alchemy_reset_on_return in workers."""

from typing import NamedTuple

import pytest
from support import databases, green
from support.databases import Database, PostgreSQL
from support.forking import require
from support.leftovers import leftovers
from support.worker import Site, Worker, running


class Setup(NamedTuple):
    """A driver under a worker pool."""

    driver: str
    pool: str

    def __str__(self) -> str:
        return "-".join(self)


ON = {"alchemy_reset_on_return": True}
SETUPS = [
    Setup("psycopg", "prefork"),
    Setup("psycopg2", "threads"),
    Setup("psycopg2", "gevent"),
    Setup("pymysql", "gevent"),
    Setup("mysqldb", "prefork"),
    Setup("psycopg", "eventlet"),
]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_workers(request: pytest.FixtureRequest, site: Site, setup: Setup, key: str) -> None:
    """Tasks that leave everything take turns, on one connection, with tasks that look."""
    driver, pool = setup
    require(driver)
    name = f"{site.prefix[:-1]}-reset-{setup}"
    database = request.getfixturevalue("run_database" if driver.startswith("psycopg") else "mariadb")
    url = database.url(name) if driver == "psycopg" else green.url_with(database, driver, name)
    role = request.getfixturevalue("role") if isinstance(database, databases.MariaDB) else ""
    found = {k: one for k, one in leftovers(driver, role).items() if "table" not in k}
    statements = [statement for one in found.values() for statement in one.leave]
    looks = [one.look for one in found.values()]
    options = {"pool_size": 1, "max_overflow": 0}
    settings = ON | {"alchemy_engine_options": options}
    worker = Worker(
        site, name, pool, url, concurrency=1 if pool == "prefork" else None, modules=("leftovers",), settings=settings
    )
    with running(worker):
        new = worker.call("look", looks).value
        assert new == [one.clean for one in found.values()]
        for _ in range(3):
            ids = [worker.send("leave", statements, end) for end in ("return", "raise", "retry")]
            seen = worker.call_together("look", [(looks,)] * 3)
            assert [outcome.value for outcome in seen] == [new] * 3
            for task_id in ids:
                worker.wait(task_id)
        if pool == "prefork":
            limited = worker.call("leave", [*statements, sleep(database)], "return", soft_time_limit=1)
            assert limited.error == "SoftTimeLimitExceeded"
            assert worker.call("look", looks).value == new
        assert "session is reset when it comes back" in worker.log()
        assert "cannot be reset" not in worker.log()
    databases.assert_no_connections(database, name)


def sleep(database: Database) -> str:
    return "SELECT pg_sleep(5)" if isinstance(database, PostgreSQL) else "SELECT SLEEP(5)"
