"""Databases whose servers prepare transactions."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from support import databases, servers
from support.databases import Database, PostgreSQL

from celery_alchemy.loadtests.errors import ServiceError
from celery_alchemy.loadtests.services.rundir import run_directory
from celery_alchemy.loadtests.services.servers import PostgreSQLServer


@pytest.fixture(scope="module")
def preparing() -> Iterator[Any]:
    """A PostgreSQL server that prepares transactions: by default none does."""
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(PostgreSQLServer(stack.enter_context(run_directory()))).url
        except ServiceError as error:
            pytest.skip(str(error))
        yield url


@pytest.fixture(scope="module")
def here(preparing: Any) -> Iterator[PostgreSQL]:
    with databases.new_postgresql(preparing, "here") as database:
        yield database


@pytest.fixture(scope="module")
def beside(preparing: Any) -> Iterator[PostgreSQL]:
    """On the same server as `here`."""
    with databases.new_postgresql(preparing, "beside") as database:
        yield database


@pytest.fixture(scope="module")
def elsewhere(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_two_phase") as database:
        yield database


PAIRS = [("here", "beside"), ("here", "elsewhere"), ("elsewhere", "here")]


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[Database, Database]:
    first, second = (request.getfixturevalue(name) for name in request.param)
    return first, second


@pytest.fixture(scope="module")
def third(preparing: Any) -> Iterator[PostgreSQL]:
    """On the same server as `here` and `beside`."""
    with databases.new_postgresql(preparing, "third") as database:
        yield database


@pytest.fixture(scope="module")
def other_schema(run_name: str) -> Iterator[databases.MariaDB]:
    """On the same server as `elsewhere`."""
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_two_phase_b") as database:
        yield database
