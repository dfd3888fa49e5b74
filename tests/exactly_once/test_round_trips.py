"""What exactly_once costs in round trips, beside the task written by hand without it; counted by a proxy."""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from sqlalchemy import create_engine, insert, make_url
from sqlalchemy.orm import Session
from support import databases
from support.exactly_once import Once, begins, done, new_id, settings_of
from support.project.models import Row

from celery_alchemy.loadtests.services.proxy import CountingProxy


class Costs(NamedTuple):
    """Round trips of a task with one INSERT."""

    by_hand: int
    first: int
    """Of a task that returns something; of one that returns None, one less where that goes in no statement."""
    last: int


#: By driver, and whether BEGIN goes with the first statement.
COSTS = {
    "psycopg": Costs(3, 6, 5),
    "psycopg-along": Costs(3, 3, 3),
    "psycopg2": Costs(3, 6, 5),
    "psycopg2-along": Costs(3, 3, 3),
    "await psycopg": Costs(3, 6, 5),
    "await psycopg-along": Costs(3, 3, 3),
    "await asyncpg": Costs(3, 6, 5),
    "pymysql": Costs(3, 4, 3),
    "await asyncmy": Costs(3, 4, 3),
    "await aiomysql": Costs(3, 4, 3),
}


@pytest.fixture(params=COSTS)
def place(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Once, CountingProxy, Costs]]:
    monkeypatch.setattr(random, "randrange", lambda most: 0)  # or old rows are deleted at any of the deliveries
    name = request.param
    driver = name.removeprefix("await ").removesuffix("-along")
    database: databases.Database = request.getfixturevalue(
        "run_database" if driver in {"psycopg", "psycopg2", "asyncpg"} else "mariadb"
    )
    settings: dict[str, Any] = {}
    if name.startswith("await"):
        settings = settings_of(driver, database) | begins(name.endswith("along"))
    elif driver == "pymysql":
        settings = {"alchemy_database_url": database.url("once")}
    else:
        settings = {
            "alchemy_database_url": database.url("once", driver),
        } | begins(name.endswith("along"))
    with CountingProxy(make_url(settings.pop("alchemy_database_url"))) as proxy:
        once = Once(database, alchemy_database_url=proxy.url.render_as_string(False), **settings)
        yield once, proxy, COSTS[name]
        once.close()


def by_hand(proxy: CountingProxy, key: str) -> int:
    plain = {"asyncpg": "psycopg", "asyncmy": "pymysql", "aiomysql": "pymysql"}
    backend, driver = proxy.url.drivername.split("+")
    engine = create_engine(proxy.url.set(drivername=f"{backend}+{plain.get(driver, driver)}"))
    found = 0
    for _ in range(7):
        before = proxy.round_trips
        with Session(engine) as session, session.begin():
            session.execute(insert(Row).values(key=key))
        found = proxy.round_trips - before
    engine.dispose()
    return found


@pytest.mark.parametrize("mode", ["first", "last"])
def test_of_one_insert(place: tuple[Once, CountingProxy, Costs], mode: Any, key: str) -> None:
    once, proxy, costs = place

    @once.task(exactly_once=mode)
    async def insert_one(self: Any) -> int:
        await done(self.db.execute(insert(Row).values(key=key)))
        return 7

    found = []
    for _ in range(7):
        before = proxy.round_trips
        assert once.deliver(insert_one, task_id=new_id()) == ("SUCCESS", 7)
        found.append(proxy.round_trips - before)
    print(found, by_hand(proxy, key))
    assert found[-1] == getattr(costs, mode)
    assert by_hand(proxy, key) == costs.by_hand
