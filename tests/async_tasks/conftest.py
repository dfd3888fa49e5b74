"""The small application, over each driver."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import make_url
from support.async_shop import Shop
from support.databases import PostgreSQL

from celery_alchemy.strategies.asynchronous import loop_thread

Start = Callable[..., Any]


@pytest.fixture(params=["postgresql+psycopg", "postgresql+asyncpg"])
def shop(request: pytest.FixtureRequest, run_database: PostgreSQL) -> Iterator[Shop]:
    url = make_url(run_database.url("async-tasks")).set(drivername=request.param)
    if "asyncpg" in request.param:
        url = url.difference_update_query(["application_name"])  # another parameter there
    shop = Shop(url.render_as_string(hide_password=False))
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
