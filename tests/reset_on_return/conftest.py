"""Databases of both servers, and a role of MariaDB."""

from collections.abc import Iterator

import pytest
from support import databases, servers
from support.databases import Database


@pytest.fixture(scope="module")
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_reset") as database:
        yield database


@pytest.fixture(scope="module")
def role(mariadb: databases.MariaDB, run_name: str) -> Iterator[str]:
    name = f"{run_name}_role"
    mariadb.execute(f"CREATE ROLE {name}")
    yield name
    mariadb.execute(f"DROP ROLE {name}")


@pytest.fixture
def database(request: pytest.FixtureRequest, driver: str) -> Database:
    if driver == "mysqldb":
        pytest.importorskip("MySQLdb", reason="mysqlclient is not installed")
    found: Database = request.getfixturevalue("mariadb" if driver in {"pymysql", "mysqldb"} else "run_database")
    return found
