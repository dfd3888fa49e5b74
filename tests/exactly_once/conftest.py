"""An app whose tasks have exactly_once, on each database."""

from collections.abc import Iterator

import pytest
from support import databases
from support.exactly_once import Once


@pytest.fixture(params=["postgresql", "mariadb"])
def where(request: pytest.FixtureRequest) -> databases.Database:
    name = "run_database" if request.param == "postgresql" else "mariadb"
    found: databases.Database = request.getfixturevalue(name)
    return found


@pytest.fixture
def once(where: databases.Database) -> Iterator[Once]:
    once = Once(where)
    yield once
    once.close()
