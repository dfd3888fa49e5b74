"""Old rows of completed tasks: which go, and how many at a time; what `celery alchemy completed` shows."""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from celery.bin.celery import celery as command
from click.testing import CliRunner
from sqlalchemy import Column, ForeignKeyConstraint, Integer, MetaData, Table, insert, text
from support import preloaded
from support.exactly_once import TABLE, Once, new_id
from support.project.models import Row

from celery_alchemy import DatabaseTask
from celery_alchemy.strategies.features import completed
from celery_alchemy.strategies.features.completed_states import OF_TASK
from celery_alchemy.strategies.features.completed_table import chosen_completed_table, recorded_id
from celery_alchemy.workers.exactly_once import pruning
from celery_alchemy.workers.exactly_once.rows import Rows
from celery_alchemy.workers.redelivery import redelivered_within_s


@pytest.fixture
def once(once: Once) -> Once:
    """One that has no rows yet."""
    once.database.execute(f"DELETE FROM {TABLE}")
    return once


def put(once: Once, *ages_s: float, task: str = "old", nesting: int = 0) -> list[str]:
    """Write rows that are so old; return their ids."""
    now, ids = time.time(), [new_id() for _ in ages_s]
    values = {"task": task, "nesting": nesting}
    rows = [{"task_id": one, "completed_at": now - age_s, **values} for one, age_s in zip(ids, ages_s, strict=True)]
    with once.database.engine.begin() as connection:
        connection.execute(insert(chosen_completed_table()), rows)
    return ids


def left(once: Once, ids: list[str]) -> list[bool]:
    return [bool(once.recorded(task_id)) for task_id in ids]


def make_task(once: Once, key: str) -> Any:
    @once.app.task(base=DatabaseTask, bind=True, name="create", exactly_once=True)
    def create(self: Any) -> str:
        self.db.add(Row(key=key))
        return "done"

    return create


@pytest.fixture
def prunes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old rows go with each new one."""
    monkeypatch.setattr(pruning, "AFTER_ROWS", 1)
    monkeypatch.setattr(random, "randrange", lambda most: 0)


@pytest.mark.usefixtures("prunes")
def test_rows_go_when_they_are_older_than_the_setting(once: Once, key: str) -> None:
    once.app.conf.alchemy_completed_kept_s = 1000
    create, ids = make_task(once, key), put(once, 5000, 500)
    assert once.deliver(create, task_id=new_id()) == ("SUCCESS", "done")
    assert left(once, ids) == [False, True]


@pytest.mark.usefixtures("prunes")
def test_rows_that_cannot_be_deleted_fail_no_task(once: Once, key: str) -> None:
    """Here because a table of the user's refers to one."""
    table, metadata = chosen_completed_table(), MetaData()
    columns = (Column("task_id", table.c.task_id.type), Column("nesting", Integer))
    here = table.to_metadata(metadata)
    keeps = Table(
        "keeps", metadata, *columns, ForeignKeyConstraint(["task_id", "nesting"], [here.c.task_id, here.c.nesting])
    )
    once.app.conf.alchemy_completed_kept_s = 1000
    create, ids = make_task(once, key), put(once, 5000)
    keeps.create(once.database.engine)
    try:
        with once.database.engine.begin() as connection:
            connection.execute(insert(keeps), {"task_id": ids[0], "nesting": 0})
        assert once.deliver(create, task_id=new_id()) == ("SUCCESS", "done")
        assert left(once, ids) == [True]
    finally:
        keeps.drop(once.database.engine)
    once.deliver(create, task_id=new_id())
    assert left(once, ids) == [False]


def test_the_oldest_go_first_and_no_more_than_asked_for(once: Once) -> None:
    ids = put(once, 500, 900, 700, 50)
    assert Rows(once.db).prune_some(100, 2) == 2
    assert left(once, ids) == [True, False, False, True]


def test_rows_that_are_locked_are_left_to_who_has_them(once: Once) -> None:
    if once.database.engine.dialect.name != "postgresql":
        pytest.skip("MariaDB waits for them")
    ids, engine = put(once, 900, 700), once.database.engine.execution_options(isolation_level="READ COMMITTED")
    with engine.begin() as other, engine.begin() as connection:
        other.execute(text(f"SELECT 1 FROM {TABLE} WHERE task_id = :i FOR UPDATE"), {"i": ids[0]})
        connection.execute(text("SET LOCAL lock_timeout = '200ms'"))
        assert completed.prune(connection, chosen_completed_table(), 100) == 1
    assert left(once, ids) == [True, False]


def run(once: Once, *arguments: str) -> Any:
    context = type("Context", (), {"app": once.app})()
    return CliRunner().invoke(command.get_command(None, "alchemy"), ["completed", *arguments], obj=context)


def test_the_command_deletes_all_that_are_old(once: Once) -> None:
    """More than one transaction takes."""
    put(once, *[900.0] * 1201)
    (young,) = put(once, 50)
    assert "1201 rows deleted" in run(once, "prune", "--older-than", "100").output
    assert once.database.column(f"SELECT task_id FROM {TABLE}") == [young]


def test_the_command_can_be_forced(once: Once) -> None:
    once.app.conf.broker_url = "redis://localhost"
    ids = put(once, 900)
    assert run(once, "prune", "--older-than", "100").exit_code == 2
    assert left(once, ids) == [True]
    assert "1 row deleted" in run(once, "prune", "--older-than", "100", "--force").output


def test_the_command_thinks_of_the_outbox(once: Once) -> None:
    """It sends a message again, whatever the broker is, until its receiver's end is known."""
    assert redelivered_within_s(once.app) is None
    once.app.conf.update(alchemy_outbox="relay", alchemy_outbox_resend_s=1000)
    ids = put(once, 900)
    assert "alchemy_outbox_resend_s" in run(once, "prune", "--older-than", "1000").output
    assert "0 rows deleted" in run(once, "prune", "--older-than", "1001").output
    assert left(once, ids) == [True]


def test_what_the_command_lists(once: Once) -> None:
    """The newest first; no states of tasks, which a result backend keeps there too."""
    first, second, third = put(once, 100, 300, 200)
    (other,) = put(once, 50, task="other")
    put(once, 10, nesting=OF_TASK)
    long = "x" * 300
    once.database.execute(f"UPDATE {TABLE} SET task_id = :i WHERE task_id = :other", i=recorded_id(long), other=other)

    def listed(*arguments: str) -> list[str]:
        return [row["task_id"] for row in json.loads(run(once, "list", "--json", *arguments).output)]

    assert listed() == [recorded_id(long), first, third, second]
    assert listed("--task", "old") == [first, third, second]
    assert listed("--limit", "2") == [recorded_id(long), first]
    assert listed(long, third) == [recorded_id(long), third]


def test_the_command_loads_the_tasks_and_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "from celery import Celery\n"
        "app = Celery('shop', broker='memory://', include=['shop_tasks'])\n"
        f"app.conf.alchemy_database_url = 'sqlite:///{tmp_path}/shop.db'\n"
    )
    (tmp_path / "shop_tasks.py").write_text("from celery_alchemy import Alchemy\nfrom shop import app\nAlchemy(app)\n")
    arguments = [sys.executable, "-m", "celery", "-A", "shop", "alchemy", "completed", "list"]
    done = preloaded.run(arguments, cwd=tmp_path, env=os.environ, timeout=250)
    assert done.returncode == 1, done.stdout
    assert "CREATE TABLE celery_alchemy_completed" in done.stderr


def test_within_what_time_a_broker_delivers_again(once: Once) -> None:
    def within_s(url: Any, **options: float) -> float | None:
        once.app.conf.update(broker_url=url, broker_transport_options=options)
        return redelivered_within_s(once.app)

    assert within_s("redis://localhost") == within_s("redis+socket:///run/redis.sock") == 3600
    assert within_s(["sentinel://one:26379", "sentinel://two:26379"]) == 3600
    assert within_s("sqs://") == 1800
    assert within_s("redis://localhost", visibility_timeout=100) == 100
    assert within_s("amqp://localhost", visibility_timeout=100) is None
