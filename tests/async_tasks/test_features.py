"""What `async def` tasks share with the others: reading, conflicts, databases, requests; and their page."""

import asyncio
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest
from celery import current_task
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from support.async_shop import Shop, add
from support.databases import PostgreSQL
from support.docs import DOCS, blocks
from support.project.models import Row

from celery_alchemy import (
    ConfigurationError,
)
from celery_alchemy.strategies.asynchronous import loop_thread

Start = Callable[..., Any]


@pytest.mark.parametrize("mode", [True, "transaction"])
def test_a_task_that_only_reads_cannot_write(shop: Shop, run_database: PostgreSQL, key: str, mode: Any) -> None:
    async def body(task: Any) -> Any:
        found = await task.db.scalar(text("SELECT current_setting('transaction_read_only')"))
        with pytest.raises(DBAPIError, match="read-only"):
            await task.db.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, '')"), {"key": key})
        await task.db.rollback()
        return found

    assert shop.run(body, read_only=mode) == "on"
    assert run_database.rows(key) == []


def test_a_lost_conflict_runs_the_coroutine_again_and_the_pause_is_awaited(
    shop: Shop, run_database: PostgreSQL, key: str
) -> None:
    attempts: list[int] = []

    async def body(task: Any) -> int:
        attempts.append(len(attempts))
        await add(task, key, f"attempt {attempts[-1]}")
        if len(attempts) < 3:
            await task.db.execute(text("DO $$ BEGIN RAISE EXCEPTION 'of two' USING ERRCODE = '40001'; END $$"))
        return len(attempts)

    assert shop.run(body, isolation_retries=3) == 3
    assert run_database.rows(key) == ["attempt 2"]


def test_several_databases_are_one_unit_of_work(
    run_database: PostgreSQL, there: PostgreSQL, psycopg_shop: Shop, key: str
) -> None:
    shop = psycopg_shop
    shop.app.conf.alchemy_databases = {"there": there.url("async-tasks")}

    async def body(task: Any, fails: bool) -> None:
        await add(task, key)
        task.session_for("there").add(Row(key=key, note="there"))
        await task.session_for("there").flush()
        if fails:
            raise KeyError

    with pytest.raises(KeyError):
        shop.run(body, True)
    assert (run_database.rows(key), there.rows(key)) == ([], [])
    shop.run(body, False)
    assert (run_database.rows(key), there.rows(key)) == (["added"], ["there"])
    for db in shop.db.databases.values():
        db.coroutines.stop()


def test_a_test_in_one_transaction_is_not_left_by_a_coroutine(psycopg_shop: Shop) -> None:
    shop = psycopg_shop

    async def body(task: Any) -> Any:
        return await task.db.scalar(text("SELECT 1"))

    task = shop.task(body)
    assert task.apply(throw=True).result == 1
    with shop.db.one_transaction(), pytest.raises(ConfigurationError, match="one_transaction"):
        task.apply(throw=True)
    assert task.apply(throw=True).result == 1
    shop.db.stop()


def test_the_page_about_async_tasks(run_database: PostgreSQL, key: str) -> None:
    code = "\n".join(blocks((DOCS / "async.md").read_text(), "python")).replace("orders", "rows_")
    url = "postgresql+psycopg://localhost/shop"
    assert url in code
    page: dict[str, Any] = {"__name__": "shop"}
    exec(code.replace(url, run_database.url("async-page")).replace("redis://localhost", "memory://"), page)
    name = f"ada-{key}"  # whatever the key: `count_both` counts the names that begin with "a"
    page["register"].apply((name,), throw=True)
    number = page["welcome"].apply((name,), throw=True).result
    assert number == f"Welcome, number {run_database.column('SELECT id FROM users WHERE name = :name', name=name)[0]}!"
    page["rename"].apply((name, f"{name}-renamed"), throw=True)
    assert page["count_both"].apply(throw=True).result[0] >= 1
    page["db"].stop()
    loop_thread.stop()


def test_children_and_threads_of_many_tasks_see_their_own_request(shop: Shop) -> None:
    variable: ContextVar[str] = ContextVar("variable")

    def look(task: Any, own: str) -> None:
        assert (task.request.id, current_task.request.id, variable.get()) == (own, own, own)

    async def child(task: Any, own: str) -> None:
        for _ in range(3):
            look(task, own)
            await asyncio.sleep(0)
        await asyncio.to_thread(look, task, own)

    async def body(task: Any) -> str:
        own = str(task.request.id)
        variable.set(own)
        session = task.db
        for _ in range(3):
            look(task, own)
            await asyncio.gather(child(task, own), child(task, own))
            assert await task.db.scalar(text("SELECT :own"), {"own": own}) == own
            assert task.db is session
        return own

    shop.app.conf.alchemy_engine_options = {"pool_size": 4, "max_overflow": 0, "pool_timeout": 60}
    task = shop.task(body)
    keys = [uuid.uuid4().hex for _ in range(40)]
    with ThreadPoolExecutor(10) as executor:
        found = list(executor.map(lambda key: task.apply(task_id=key, throw=True).result, keys))
    assert found == keys
