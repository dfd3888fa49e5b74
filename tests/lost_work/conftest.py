"""An Alchemy on a database of each driver."""

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from support import databases, servers
from support.databases import PostgreSQL, new_sqlite

from celery_alchemy import Alchemy, WorkerPool

DRIVERS = ("psycopg", "psycopg2", "pymysql", "mysqldb", "sqlite")


@pytest.fixture(scope="module")
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_lost") as database:
        yield database


@pytest.fixture(params=DRIVERS)
def place(request: pytest.FixtureRequest, run_database: PostgreSQL, tmp_path: Any) -> Iterator[tuple[str, Any]]:
    """A driver's URL of a database, and that database."""
    driver = request.param
    if driver == "sqlite":
        with new_sqlite(tmp_path / "lost.sqlite3") as database:
            yield database.url("lost"), database
    elif driver in {"pymysql", "mysqldb"}:
        if driver == "mysqldb":
            pytest.importorskip("MySQLdb", reason="no mysqlclient here")
        database = request.getfixturevalue("mariadb")
        yield database.url("lost").replace("+pymysql", f"+{driver}"), database
    else:
        yield run_database.url("lost", driver=driver), run_database


@pytest.fixture
def db(place: tuple[str, Any]) -> Iterator[Alchemy]:
    app = Celery("lost", broker="memory://", set_as_current=False)
    app.conf.alchemy_database_url = place[0]
    db = Alchemy(app)
    db.start_worker(WorkerPool(name="solo"))
    yield db
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    db.stop()
