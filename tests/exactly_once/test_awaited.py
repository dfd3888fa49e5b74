"""exactly_once of `async def` tasks: what differs from the others. What does not is in the tests of both spellings."""

import asyncio
import json
import random
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
from celery.bin.celery import celery as command
from celery.result import AsyncResult
from click.testing import CliRunner
from support import databases
from support.databases import PostgreSQL
from support.exactly_once import AWAITED_SERVERS, TABLE, Once, Place, fixture_of, new_id, settings_of
from support.once_flows import Flows
from support.project.models import Row

from celery_alchemy import AsyncDatabaseTask, ConfigurationError
from celery_alchemy.workers import pausing
from celery_alchemy.workers.exactly_once import pruning, runner
from celery_alchemy.workers.watching.outbox import in_short

place = fixture_of(AWAITED_SERVERS)


def test_a_copy_that_waits_lets_the_loop_go_on(once: Once, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GIVES_BACK_AFTER_S", 0.3)
    begun, others = Event(), asyncio.Event()

    @once.app.task(base=AsyncDatabaseTask, bind=True, exactly_once=True, acks_late=True)
    async def work(self: Any) -> str:
        self.db.add(Row(key=key))
        await self.db.flush()
        begun.set()
        await asyncio.wait_for(others.wait(), 20)  # set on the loop, by another task
        return "done"

    @once.app.task(base=AsyncDatabaseTask, bind=True)
    async def go_on(self: Any) -> None:
        others.set()

    def fail(seconds: float) -> None:
        raise AssertionError(f"the loop was stopped for {seconds} s")

    task_id = new_id()
    results: list[Any] = []
    monkeypatch.setattr(pausing, "time", SimpleNamespace(sleep=fail))
    first = Thread(target=lambda: results.append(once.deliver(work, task_id=task_id)))
    first.start()
    assert begun.wait(20)
    assert once.deliver(work, task_id=task_id)[0] == "REJECTED"
    once.deliver(go_on, task_id=new_id())
    first.join(20)
    assert results == [("SUCCESS", "done")]
    assert once.deliver(work, task_id=task_id) == ("SUCCESS", "done")
    assert once.database.rows(key) == [""]


@pytest.mark.parametrize("mode", ["first", "last"])
def test_a_copy_is_overtaken_inside_a_task_group(once: Once, mode: Any, key: str) -> None:
    """What ends its run comes out of the group as one of several errors."""

    @once.app.task(base=AsyncDatabaseTask, bind=True, exactly_once=mode)
    async def work(self: Any) -> str:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0.01))
            self.db.add(Row(key=key))
            await self.db.flush()
            await asyncio.sleep(0.03)
            if mode == "last":
                await self.db.commit()
        return "done"

    for number in range(3):
        assert once.at_once(work, task_id=new_id(), copies=3) == [("SUCCESS", "done")] * 3
        assert len(once.database.rows(key)) == number + 1


def test_its_own_call_runs_around_it(once: Once, key: str) -> None:
    class Own(AsyncDatabaseTask):
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return [super().__call__(*args, **kwargs)]

    @once.app.task(base=Own, bind=True, exactly_once=True)
    async def work(self: Any) -> int:
        self.db.add(Row(key=key))
        return 1

    task_id = new_id()
    assert [once.deliver(work, task_id=task_id) for _ in range(2)] == [("SUCCESS", [1])] * 2
    assert {state for state, _ in once.at_once(work, task_id=new_id(), copies=3)} == {"SUCCESS"}
    assert len(once.database.rows(key)) == 2


def test_called_like_a_function_it_records_nothing(once: Once, key: str) -> None:
    @once.app.task(base=AsyncDatabaseTask, bind=True, exactly_once=True)
    async def inner(self: Any) -> int:
        self.db.add(Row(key=key))
        return 1

    @once.app.task(base=AsyncDatabaseTask, bind=True, exactly_once=True)
    async def outer(self: Any) -> int:
        return await inner() + await inner()

    task_id = new_id()
    for _ in range(2):
        assert once.deliver(outer, task_id=task_id) == ("SUCCESS", 2)
    assert len(once.recorded(task_id)) == 1
    assert len(once.database.rows(key)) == 2


def test_what_is_recorded_is_reached_from_outside_the_loop(once: Once, key: str) -> None:
    """By `db.forget`, by the command, by the result backend: an Engine for asyncio alone has no other side."""

    @once.app.task(base=AsyncDatabaseTask, bind=True, exactly_once=True, name="work")
    async def work(self: Any) -> str:
        self.db.add(Row(key=key))
        return "done"

    @once.app.task(base=AsyncDatabaseTask, bind=True)
    async def forget_here(self: Any, task_id: str) -> int:
        async def child() -> int:
            with pytest.raises(ConfigurationError, match=r"asyncio\.to_thread\(db\.forget, task_id\)"):
                once.db.forget(task_id)
            return await asyncio.to_thread(once.db.forget, task_id)

        return await asyncio.create_task(child())

    task_id = new_id()
    once.deliver(work, task_id=task_id)
    context = type("Context", (), {"app": once.app})()
    arguments = ["completed", "list", "--json", task_id]
    shown = CliRunner().invoke(command.get_command(None, "alchemy"), arguments, obj=context)
    assert [row["task"] for row in json.loads(shown.output)] == ["work"]
    if "psycopg" not in str(once.app.conf.alchemy_database_url):
        assert once.deliver(forget_here, task_id, task_id=new_id()) == ("SUCCESS", 1)
    else:
        assert once.db.forget(task_id) == 1
    assert once.deliver(work, task_id=task_id) == ("SUCCESS", "done")
    assert len(once.database.rows(key)) == 2


def test_old_rows_go_with_new_ones(once: Once, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "AFTER_ROWS", 1)
    monkeypatch.setattr(random, "randrange", lambda most: 0)

    @once.app.task(base=AsyncDatabaseTask, bind=True, exactly_once=True)
    async def work(self: Any) -> None:
        self.db.add(Row(key=key))

    ids = [new_id(), new_id()]
    for task_id in ids:
        once.deliver(work, task_id=task_id)
        once.database.execute(f"UPDATE {TABLE} SET completed_at = 0 WHERE task_id = :i", i=task_id)
    assert [len(once.recorded(task_id)) for task_id in ids] == [0, 1]
    once.db.forget(ids[1])


def test_results_in_the_same_table(place: Place, key: str) -> None:
    once = Once(place[0], result_backend="alchemy://", **place[1])

    @once.app.task(base=AsyncDatabaseTask, bind=True, exactly_once=True)
    async def work(self: Any, fails: bool) -> str:
        self.db.add(Row(key=key))
        await self.db.flush()
        if fails:
            raise KeyError(key)
        return "done"

    good, bad = new_id(), new_id()
    try:
        once.deliver(work, False, task_id=good)
        once.deliver(work, True, task_id=bad)
        assert AsyncResult(good, app=once.app).get(timeout=1) == "done"
        assert AsyncResult(bad, app=once.app).state == "FAILURE"
    finally:
        once.close()
    assert once.database.rows(key) == [""]


@pytest.mark.parametrize("mode", ["first", "last"])
def test_several_databases(run_database: PostgreSQL, there: PostgreSQL, mode: Any, key: str) -> None:
    urls = settings_of("psycopg", run_database), settings_of("psycopg", there)
    once = Once(run_database, alchemy_databases={"there": urls[1]["alchemy_database_url"]}, **urls[0])

    @once.app.task(base=AsyncDatabaseTask, bind=True, exactly_once=mode)
    async def work(self: Any) -> str:
        self.session_for("there").add(Row(key=key))
        self.db.add(Row(key=key))
        return "done"

    @once.app.task(base=AsyncDatabaseTask, bind=True, exactly_once=mode)
    async def only_there(self: Any) -> str:
        self.session_for("there").add(Row(key=key))
        return "done"

    try:
        for number, task in enumerate((work, only_there), 1):
            task_id = new_id()
            for _ in range(2):
                assert once.deliver(task, task_id=task_id) == ("SUCCESS", "done")
            assert len(there.rows(key)) == number
            assert len(once.recorded(task_id)) == 1
        assert len(run_database.rows(key)) == 1
    finally:
        for db in once.db.databases.values():
            db.coroutines.stop()
        once.close()


def test_on_sqlite_one_file_at_a_time(tmp_path: Any, key: str) -> None:
    with databases.new_sqlite(tmp_path / "once.sqlite3") as database:
        once = Once(database, **settings_of("aiosqlite", database))

        @once.app.task(base=AsyncDatabaseTask, bind=True, exactly_once=True)
        async def work(self: Any) -> str:
            self.db.add(Row(key=key))
            await self.db.flush()
            return "done"

        try:
            for number in range(3):
                assert once.at_once(work, task_id=new_id(), copies=3) == [("SUCCESS", "done")] * 3
                assert len(database.rows(key)) == number + 1
        finally:
            once.close()


def test_the_outbox_is_reached_from_outside_the_loop(place: Place, key: str) -> None:
    """By the commands, by `inspect sessions`, and by who sends it."""
    flows = Flows(place[0], **place[1])
    context = type("Context", (), {"app": flows.app})()

    def command_says(*arguments: str) -> Any:
        found = CliRunner().invoke(command.get_command(None, "alchemy"), ["outbox", *arguments], obj=context)
        assert found.exit_code == 0, found.output
        return json.loads(found.output)

    try:
        flows.by_outbox(flows.step, None, key, "one")
        (row,) = command_says("list", "--json")["messages"]
        assert row["task"] == "step"
        assert in_short(flows.db, 20) == {"waiting": 1, "sent": 0, "set_aside": 0, "oldest_s": ANY, "error": None}
        assert command_says("retry", "--json", row["task_id"]) == {"messages": 1}
        flows.work()
        assert flows.traces(key) == ["None>one"]
        flows.by_outbox(flows.step, None, key, "two")
        assert command_says("drop", "--json", "--all") == {"messages": 2}
        assert flows.outbox() == []
    finally:
        flows.close()
