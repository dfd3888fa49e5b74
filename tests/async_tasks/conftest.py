"""The small application, over each driver."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.async_shop import Shop
from support.databases import PostgreSQL

from celery_alchemy.strategies.asynchronous import loop_thread

Start = Callable[..., Any]


@pytest.fixture(params=["postgresql+psycopg", "postgresql+asyncpg"])
def shop(request: pytest.FixtureRequest, run_database: PostgreSQL) -> Iterator[Shop]:
    _, _, rest = run_database.url("async-tasks").partition("://")
    if "asyncpg" in request.param:
        rest = rest.partition("?")[0]  # the name of an application is another parameter there
    shop = Shop(f"{request.param}://{rest}")
    yield shop
    shop.db.coroutines.stop()
    shop.app.close()
    loop_thread.stop()


@pytest.fixture
def psycopg_shop(run_database: PostgreSQL) -> Iterator[Shop]:
    """For what is above the drivers, or needs one that serves ordinary tasks too."""
    shop = Shop(run_database.url("async-tasks"))
    yield shop
    shop.db.coroutines.stop()
    shop.app.close()
    loop_thread.stop()
