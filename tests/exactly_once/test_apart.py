"""Work in a transaction of its own, in the body of a task with `exactly_once`: the log says that it is not recorded."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import insert, select
from support.exactly_once import AWAITED_SERVERS, PLACES, Once, fixture_of, new_id
from support.project.models import Row

from celery_alchemy import DatabaseTask

place = fixture_of([*PLACES, *AWAITED_SERVERS])
Body = Callable[[Once, Any, str], Any]


def _in_a_block(once: Once, task: Any, key: str) -> None:
    with once.db.unit_of_work() as session:
        session.add(Row(key=key))


def _in_an_eager_task(once: Once, task: Any, key: str) -> None:
    _other(once).apply((key,)).get(disable_sync_subtasks=False)


def _on_a_connection(once: Once, task: Any, key: str) -> None:
    with once.db.engine.begin() as connection:
        connection.execute(insert(Row).values(key=key))


def _with_its_session(once: Once, task: Any, key: str) -> None:
    task.db.add(Row(key=key))


def _in_its_own_commit(once: Once, task: Any, key: str) -> None:
    task.db.add(Row(key=key))
    task.db.commit()


def _in_a_function(once: Once, task: Any, key: str) -> None:
    _other(once)(key)


def _rolled_back(once: Once, task: Any, key: str) -> None:
    task.db.add(Row(key=key))
    task.db.rollback()


def _forgotten(once: Once, task: Any, key: str) -> None:
    assert once.db.forget("another") == 0


def _nothing(once: Once, task: Any, key: str) -> None:
    with once.db.unit_of_work() as session:
        session.scalars(select(Row).where(Row.key == key)).all()


def _other(once: Once) -> Any:
    return once.app.tasks["other"]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [message for message in found if "in a transaction of its own" in message]


@pytest.mark.parametrize(
    ("work", "is_apart"),
    [
        *((work, True) for work in (_in_a_block, _in_an_eager_task, _on_a_connection)),
        *(
            (work, False)
            for work in (_with_its_session, _in_its_own_commit, _in_a_function, _rolled_back, _forgotten, _nothing)
        ),
    ],
)
@pytest.mark.parametrize("mode", ["first", "last"])
@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_work_apart_is_said_once(
    once: Once, key: str, work: Body, is_apart: bool, mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @once.app.task(base=DatabaseTask, bind=True, name="other")
    def other(self: Any, key: str) -> None:
        self.db.add(Row(key=key))

    @once.app.task(base=DatabaseTask, bind=True, name=new_id(), exactly_once=mode)
    def outer(self: Any) -> str:
        work(once, self, key)
        return "done"

    once.app.finalize()
    for number in range(2):
        assert once.deliver(outer, task_id=(task_id := new_id())) == ("SUCCESS", "done")
        messages = said(caplog)
        assert len(messages) == is_apart, messages
        assert not is_apart or number or task_id in messages[0]


@pytest.mark.parametrize("place", AWAITED_SERVERS, indirect=True)
def test_in_a_coroutine_too(once: Once, key: str, caplog: pytest.LogCaptureFixture) -> None:
    @once.app.task(base=once.base, bind=True, name=new_id(), exactly_once=True)
    async def outer(self: Any, apart: bool) -> str:
        if apart:
            async with once.db.async_unit_of_work() as session:
                session.add(Row(key=key))
        self.db.add(Row(key=key))
        return "done"

    for apart in (False, True, True):
        assert once.deliver(outer, apart, task_id=new_id()) == ("SUCCESS", "done")
        assert len(said(caplog)) == apart
