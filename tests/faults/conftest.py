"""Fixtures of the fault tests: workers that leave nothing behind."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.databases import Database, assert_no_connections
from support.worker import Site, Start, Worker, running


@pytest.fixture
def start(site: Site, database: Database) -> Start:
    """Start a worker for the time of a block; afterwards the server lists no connection of it."""

    @contextmanager
    def start(pool: str, *, url: str = "", **options: Any) -> Iterator[Worker]:
        name = f"{site.prefix[:-1]}-{uuid.uuid4().hex[:6]}"
        with running(Worker(site, name, pool, database_url=url or database.url(name), **options)) as worker:
            yield worker
        assert_no_connections(database, name)

    return start
