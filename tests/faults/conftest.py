"""Fixtures of the fault tests: workers that leave nothing behind."""

import contextlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import make_url
from support.databases import Database, assert_no_connections
from support.worker import Site, Start, Worker, running

from celery_alchemy.loadtests.services.proxy import Proxy


@pytest.fixture
def start(site: Site, database: Database) -> Start:
    """Start a worker for the time of a block; afterwards the server lists no connection of it.

    `through` is a Proxy by which it reaches the database.
    """

    @contextmanager
    def start(pool: str, *, url: str = "", through: Proxy | None = None, **options: Any) -> Iterator[Worker]:
        name = f"{site.prefix[:-1]}-{uuid.uuid4().hex[:6]}"
        url = url or database.url(name)
        if through is not None:
            there = make_url(url).set(host=through.url.host, port=through.port)
            url = there.difference_update_query(["host"]).render_as_string(hide_password=False)
        with running(Worker(site, name, pool, database_url=url, **options)) as worker:
            yield worker
        assert_no_connections(database, name)

    return start


@pytest.fixture
def proxy(database: Database) -> Iterator[Proxy]:
    """A network between a worker and its database, for the test to break."""
    with contextlib.closing(Proxy(make_url(database.url("proxy")))) as proxy:
        yield proxy
