"""Copies of a task at the same moment, in each isolation level: one effect, equal results, no failure."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import select, update
from support.exactly_once import BOTH_SPELLINGS, Once, Place, done, fixture_of, new_id
from support.project.models import Counter, Row, User

FULL = os.environ.get("CELERY_ALCHEMY_FAULTS") == "full"
PAIRS = int(os.environ.get("EXACTLY_ONCE_PAIRS", "1000" if FULL else "40"))
"""In each mode: twice as many on each database in each isolation level."""
LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]


place = fixture_of(BOTH_SPELLINGS)


@pytest.fixture(params=LEVELS)
def once(request: pytest.FixtureRequest, place: Place) -> Iterator[Once]:
    options = {"isolation_level": request.param, "pool_size": 4, **place[1].pop("alchemy_engine_options", {})}
    once = Once(place[0], alchemy_engine_options=options, **place[1])
    yield once
    once.close()


@pytest.mark.timeout(60 + PAIRS)
@pytest.mark.parametrize("mode", ["first", "last"])
def test_pairs(once: Once, mode: Any, key: str) -> None:
    """The task reads, inserts, counts, and inserts what may be there once: each a way to meet its copy."""

    @once.task(exactly_once=mode)
    async def work(self: Any, name: str) -> int:
        await done(self.db.scalars(select(Row).where(Row.key == key)))
        self.db.add(Row(key=key))
        await done(self.db.execute(update(Counter).where(Counter.key == key).values(value=Counter.value + 1)))
        user = User(name=name)
        self.db.add(user)
        await done(self.db.flush())
        return user.id

    once.database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=key)
    for number in range(PAIRS):
        results = once.at_once(work, f"{key}-{number}", task_id=new_id())
        assert [state for state, _ in results] == ["SUCCESS"] * 2, results
        assert results[0] == results[1]
    assert once.database.column("SELECT value FROM counters WHERE key_ = :key", key=key) == [PAIRS]
    assert len(once.database.rows(key)) == PAIRS
