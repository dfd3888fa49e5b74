"""Each test runs with the five drivers for asyncio."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import databases
from support.async_drivers import DRIVERS, Server


@pytest.fixture(params=DRIVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    driver: str = request.param
    name = f"async-{driver}-{uuid.uuid4().hex[:6]}"
    if driver == "aiosqlite":
        with databases.new_sqlite(tmp_path / "test.sqlite3") as database:
            yield Server(driver, database, name)
            return
    database = request.getfixturevalue("mariadb" if driver in {"asyncmy", "aiomysql"} else "run_database")
    yield Server(driver, database, name)
    databases.assert_no_connections(database, name)
