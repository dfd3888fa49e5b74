"""`result_backend = "alchemy://"`: SUCCESS is seen if and only if the rows are."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import group, states
from celery.result import AsyncResult, GroupResult
from support import databases, preloaded
from support.exactly_once import Once, new_id, together
from support.project.models import Row

from celery_alchemy import DatabaseTask
from celery_alchemy.strategies.features.completed_table import recorded_id


@pytest.fixture
def once(place: tuple[databases.Database, dict[str, Any]]) -> Iterator[Once]:
    once = Once(place[0], result_backend="alchemy://", **place[1])
    yield once
    once.close()


def result_of(once: Once, task_id: str) -> AsyncResult[Any]:
    return AsyncResult(task_id, app=once.app)


@pytest.mark.parametrize("more", ["", " ", "x" * 300])
def test_success_comes_with_the_commit(once: Once, key: str, more: str) -> None:
    seen = []

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True)
    def create(self: Any) -> dict[str, int]:
        self.db.add(Row(key=key))
        self.db.flush()
        seen.append(result_of(once, self.request.id).state)
        once.db.on_commit(lambda: seen.append(result_of(once, self.request.id).state))
        return {"number": 7}

    task_id = new_id() + more
    assert result_of(once, task_id).state == states.PENDING
    once.deliver(create, task_id=task_id)
    assert seen == ["PENDING", "SUCCESS"]
    result = result_of(once, task_id)
    assert result.get(timeout=1) == {"number": 7}
    assert result.date_done is not None
    assert len(once.recorded(recorded_id(task_id))) == 1
    result.forget()
    assert result_of(once, task_id).state == states.SUCCESS
    once.db.forget(task_id)
    assert result_of(once, task_id).state == states.PENDING


def test_a_task_that_reads_a_result_does_not_find_its_own_children_there(once: Once) -> None:
    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True)
    def work(self: Any) -> None:
        self.db.add(Row(key=self.request.id))

    @once.app.task(bind=True)
    def read(self: Any, task_id: str) -> Any:
        work.delay()
        assert len(self.request.children) == 1
        return result_of(once, task_id).children

    task_id = new_id()
    once.deliver(work, task_id=task_id)
    assert once.deliver(read, task_id, task_id=new_id()) == ("SUCCESS", [])


def test_failures_and_other_tasks_are_beside_it(once: Once) -> None:
    @once.app.task
    def plain(number: int) -> int:
        return 10 // number

    good, bad = new_id(), new_id()
    once.deliver(plain, 5, task_id=good)
    once.deliver(plain, 0, task_id=bad)
    assert result_of(once, good).get(timeout=1) == 2
    assert result_of(once, bad).state == states.FAILURE
    with pytest.raises(ZeroDivisionError):
        result_of(once, bad).get(timeout=1)
    once.deliver(plain, 2, task_id=bad)
    assert result_of(once, bad).get(timeout=1) == 5
    result_of(once, bad).forget()
    assert result_of(once, bad).state == states.PENDING
    once.deliver(plain, 0, task_id=bad)
    assert once.db.forget(bad) == 1
    assert result_of(once, bad).state == states.PENDING
    once.app.backend.expires = 0.0001
    once.app.backend.cleanup()
    assert result_of(once, good).state == states.PENDING


def test_a_group_is_saved_and_joined(once: Once) -> None:
    @once.app.task(base=DatabaseTask, exactly_once=True)
    def double(number: int) -> int:
        return number * 2

    canvas = group(double.s(number) for number in range(4))
    frozen = canvas.freeze()
    frozen.save()
    for number, child in enumerate(frozen.results):
        once.deliver(double, number, task_id=child.id)
    restored = GroupResult.restore(frozen.id, app=once.app)
    assert restored is not None
    assert restored.successful()
    assert restored.join(timeout=2) == [0, 2, 4, 6]
    restored.delete()
    assert GroupResult.restore(frozen.id, app=once.app) is None


def test_states_that_are_stored_at_the_same_moment(once: Once) -> None:
    for _ in range(5):
        task_id = new_id()
        store = once.app.backend.store_result
        together([lambda: store(task_id, 1, states.STARTED)] * 3)  # noqa: B023
        assert result_of(once, task_id).state == states.STARTED


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("app.conf.result_backend = 'alchemy://'", "Results are kept in the database (result_backend), but nothing in"),
        ("app.conf.alchemy_exactly_once = True", "Tasks have exactly_once, but nothing in this process declares its"),
        ("task(exactly_once='last')", "Tasks have exactly_once, but nothing in this process declares its table"),
        ("task(exactly_once=True); kept = completed_tasks_table(MetaData())", None),
        ("app.conf.update(alchemy_completed_table='shop.done', alchemy_exactly_once=True)", "its table 'shop.done'"),
        ("task(exactly_once=False)", None),
        ("app.conf.result_backend = 'cache+memory://'", None),
    ],
)
def test_a_worker_says_that_no_table_of_completed_tasks_is_declared(
    tmp_path: Path, code: str, says: str | None
) -> None:
    """It connects to nothing when it starts: it can only tell what its code declares."""
    script = tmp_path / "start.py"
    script.write_text(
        "import logging, sys\n"
        "from celery import Celery\nfrom sqlalchemy import MetaData\n"
        "from celery_alchemy import Alchemy, DatabaseTask, completed_tasks_table\n"
        "logging.basicConfig(stream=sys.stdout)\n"
        "app = Celery('shop', broker='memory://')\n"
        "app.conf.alchemy_database_url = 'postgresql+psycopg://127.0.0.1:1/shop'\n"
        "def create(): pass\n"
        "def task(**options): return app.task(base=DatabaseTask, name='shop.create', **options)(create)\n"
        f"db = Alchemy(app)\ntask() if 'task(' not in {code!r} else None\n{code}\n"
        "app.WorkController(pool_cls='solo')\n"
    )
    done = preloaded.run([sys.executable, str(script)], cwd=tmp_path, env=os.environ, timeout=250)
    assert done.returncode == 0, done.stderr
    if says is None:
        assert "declares its table" not in done.stdout
    else:
        assert says in done.stdout
