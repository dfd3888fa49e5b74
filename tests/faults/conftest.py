"""Fixtures of the fault tests: a seeded chance, and workers that leave nothing behind."""

import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from support.databases import Database, assert_no_connections
from support.faults import SEED
from support.worker import Site, Worker, running

Start = Callable[..., AbstractContextManager[Worker]]


@pytest.fixture
def chance() -> random.Random:
    """The randomness of a test, the same each time; CELERY_ALCHEMY_SEED sets another seed."""
    print(f"CELERY_ALCHEMY_SEED={SEED}")  # pytest shows it when the test fails
    return random.Random(SEED)


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
