"""A task that is delivered twice has its effects in the database once, and the same result."""

from typing import Any

import pytest
from celery.exceptions import Retry
from support.exactly_once import AWAITED_PLACES, PLACES, Once, done, fixture_of, new_id
from support.project.models import Row

from celery_alchemy import ConfigurationError

MODES = ["first", "last"]


place = fixture_of([*PLACES, *AWAITED_PLACES])


@pytest.mark.parametrize("mode", MODES)
def test_the_second_delivery_does_not_run_and_returns_the_same(once: Once, mode: Any, key: str) -> None:
    runs = []

    @once.task(exactly_once=mode)
    async def create(self: Any, note: str) -> dict[str, Any]:
        runs.append(note)
        self.db.add(Row(key=key, note=note))
        return {"note": note, "number": len(runs)}

    task_id = new_id()
    results = [once.deliver(create, "one", task_id=task_id) for _ in range(3)]
    assert results == [("SUCCESS", {"note": "one", "number": 1})] * 3
    assert once.database.rows(key) == ["one"]
    assert runs == ["one"]
    assert len(once.recorded(task_id)) == 1


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_recorded_of_a_failure_and_of_a_retry(once: Once, mode: Any, key: str) -> None:
    ends: list[Any] = [ValueError("no"), Retry(), None]

    @once.task(exactly_once=mode)
    async def work(self: Any) -> str:
        self.db.add(Row(key=key))
        await done(self.db.flush())
        end = ends.pop(0)
        if end is not None:
            raise end
        return "done"

    task_id = new_id()
    assert once.deliver(work, task_id=task_id)[0] == "FAILURE"
    assert once.recorded(task_id) == []
    assert once.deliver(work, task_id=task_id)[0] == "RETRY"
    assert once.recorded(task_id) == []
    assert once.deliver(work, task_id=task_id) == ("SUCCESS", "done")
    assert once.deliver(work, task_id=task_id) == ("SUCCESS", "done")
    assert once.database.rows(key) == [""]


@pytest.mark.parametrize("mode", MODES)
def test_what_does_nothing_in_the_database_is_recorded_too(once: Once, mode: Any) -> None:
    runs = []

    @once.task(exactly_once=mode)
    async def call(self: Any) -> int:
        runs.append(1)
        return 3

    task_id = new_id()
    assert [once.deliver(call, task_id=task_id) for _ in range(2)] == [("SUCCESS", 3)] * 2
    assert runs == [1]


@pytest.mark.parametrize("mode", MODES)
def test_an_early_commit_is_done_once_and_the_result_is_recorded_at_the_end(once: Once, mode: Any, key: str) -> None:
    @once.task(exactly_once=mode)
    async def create(self: Any) -> int:
        row = Row(key=key)
        self.db.add(row)
        await done(self.db.commit())
        return row.id

    task_id = new_id()
    first = once.deliver(create, task_id=task_id)
    assert first[0] == "SUCCESS"
    assert once.deliver(create, task_id=task_id) == first
    assert once.database.rows(key) == [""]


@pytest.mark.parametrize("mode", MODES)
def test_a_second_commit_that_writes_is_refused(once: Once, mode: Any, key: str) -> None:
    @once.task(exactly_once=mode)
    async def create(self: Any) -> None:
        self.db.add(Row(key=key, note="first"))
        await done(self.db.commit())
        self.db.add(Row(key=key, note="second"))

    state, error = once.deliver(create, task_id=new_id())
    assert state == "FAILURE"
    assert "Leave self.db.commit() out" in str(error)
    assert once.database.rows(key) == ["first"]


@pytest.mark.parametrize("mode", MODES)
def test_copies_at_the_same_moment(once: Once, mode: Any, key: str) -> None:
    @once.task(exactly_once=mode)
    async def create(self: Any) -> int:
        row = Row(key=key)
        self.db.add(row)
        await done(self.db.flush())
        return row.id

    for _ in range(10):
        before = len(once.database.rows(key))
        results = once.at_once(create, task_id=new_id(), copies=3)
        assert {state for state, _ in results} == {"SUCCESS"}
        assert len({value for _, value in results}) == 1
        assert len(once.database.rows(key)) == before + 1


def test_what_only_reads_is_refused(once: Once) -> None:
    with pytest.raises(ConfigurationError, match="leave one of them out"):

        @once.task(exactly_once=True, read_only=True, lazy=False)
        async def read(self: Any) -> None: ...
