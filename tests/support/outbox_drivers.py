"""An app with an outbox, on each database and with each driver."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from support.databases import SQLite
from support.outbox import TABLE, Shop
from support.project.models import Base

DRIVERS = ["psycopg", "psycopg2", "pymysql", "mysqldb", "sqlite"]


@contextlib.contextmanager
def shop_of(driver: str, request: pytest.FixtureRequest, path: Path, **settings: Any) -> Iterator[Shop]:
    """Yield an app with an outbox whose database is asked by `driver`."""
    if driver == "sqlite":
        database: Any = SQLite(make_url(f"sqlite:///{path}/shop.db"))
        Base.metadata.create_all(database.engine)
        url = database.url("outbox")
    elif driver.startswith("psycopg"):
        database = request.getfixturevalue("run_database")
        url = database.url("outbox", driver)
    else:
        if driver == "mysqldb":
            pytest.importorskip("MySQLdb")
        database = request.getfixturevalue("mariadb")
        url = database.url("outbox").replace("pymysql", driver)
    database.execute(f"DELETE FROM {TABLE}")
    shop = Shop(database, url, **settings)
    try:
        yield shop
    finally:
        shop.stop()
        database.engine.dispose()
