"""An app whose tasks have exactly_once, on each database, with and without BEGIN sent with the first statement."""

from collections.abc import Iterator
from typing import Any

import pytest
from support import databases
from support.exactly_once import Once

PLACES = {
    "postgresql": ("psycopg", False),
    "psycopg-along": ("psycopg", True),
    "psycopg2-along": ("psycopg2", True),
    "mariadb": (None, False),
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> tuple[databases.Database, dict[str, Any]]:
    """A database, and the settings of an app on it."""
    driver, along = PLACES[request.param]
    if driver is None:
        mariadb: databases.MariaDB = request.getfixturevalue("mariadb")
        return mariadb, {"alchemy_database_url": mariadb.url("once")}
    database: databases.PostgreSQL = request.getfixturevalue("run_database")
    url = database.url("once", driver)
    return database, {"alchemy_database_url": url, "alchemy_begin_with_first_statement": along}


@pytest.fixture
def once(place: tuple[databases.Database, dict[str, Any]]) -> Iterator[Once]:
    once = Once(place[0], **place[1])
    yield once
    once.close()
