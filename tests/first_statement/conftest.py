"""An Alchemy that sends BEGIN with the first statement, behind a proxy that counts round trips."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import make_url, text
from support import green
from support.apps import make_app
from support.databases import PostgreSQL
from support.first_statement import (
    DRIVERS,
    Started,
)

from celery_alchemy import Alchemy, WorkerPool
from celery_alchemy.loadtests.services.proxy import CountingProxy

NAME = f"first-{os.getpid()}"
"""Of the connections: other processes of the same test run look at the same server."""


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def proxy(run_database: PostgreSQL, driver: str) -> Iterator[CountingProxy]:
    with CountingProxy(make_url(green.url_with(run_database, driver, NAME))) as proxy:
        yield proxy


@pytest.fixture
def started(proxy: CountingProxy, run_database: PostgreSQL) -> Iterator[Started]:
    """Make an Alchemy on the database behind the proxy; afterwards nothing is open."""
    with contextlib.ExitStack() as stack:

        def start(mode: object = True, **changes: Any) -> Alchemy:
            _, db = make_app(
                proxy.url.render_as_string(hide_password=False),
                changes={"alchemy_begin_with_first_statement": mode, **changes},
            )
            db.start_worker(WorkerPool(name="solo"))
            stack.callback(db.stop)
            with db.engine.connect() as connection:  # connecting is not what is counted
                connection.execute(text("SELECT 1"))
            return db

        yield start
        assert run_database.busy(NAME) == []


@pytest.fixture
def db(started: Started) -> Alchemy:
    return started()
