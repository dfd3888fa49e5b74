"""What exactly_once costs on PostgreSQL, in round trips: no more than the task written by hand without it."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, insert, make_url
from sqlalchemy.orm import Session
from support.databases import PostgreSQL
from support.exactly_once import Once, new_id
from support.project.models import Row

from celery_alchemy import DatabaseTask
from celery_alchemy.loadtests.services.proxy import CountingProxy


@pytest.fixture(params=["psycopg", "psycopg2"])
def proxy(request: pytest.FixtureRequest, run_database: PostgreSQL) -> Iterator[CountingProxy]:
    with CountingProxy(make_url(run_database.url("once", request.param))) as proxy:
        yield proxy


def by_hand(proxy: CountingProxy, key: str) -> int:
    engine = create_engine(proxy.url)
    found = 0
    for _ in range(4):
        before = proxy.round_trips
        with Session(engine) as session, session.begin():
            session.execute(insert(Row).values(key=key))
        found = proxy.round_trips - before
    engine.dispose()
    return found


@pytest.mark.parametrize(("mode", "result", "most"), [("first", None, 3), ("first", 7, 3), ("last", 7, 3)])
def test_no_more_than_by_hand(
    proxy: CountingProxy, run_database: PostgreSQL, mode: Any, result: Any, most: int, key: str
) -> None:
    once = Once(
        run_database, alchemy_database_url=proxy.url.render_as_string(False), alchemy_begin_with_first_statement=True
    )

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode)
    def create(self: Any) -> Any:
        self.db.execute(insert(Row).values(key=key))
        return result

    found = []
    for _ in range(4):
        before = proxy.round_trips
        assert once.deliver(create, task_id=new_id()) == ("SUCCESS", result)
        found.append(proxy.round_trips - before)
    once.close()
    assert found[-1] <= most
    assert found[-1] <= by_hand(proxy, key)
