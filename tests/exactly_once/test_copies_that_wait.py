"""A copy that waits for the one that runs, or has been lost: it holds no connection, and gives its message back. That
is no error of the task's, so `autoretry_for` does not try it again."""

import traceback
from typing import Any

import pytest
from celery.exceptions import Reject
from support.exactly_once import BOTH_SPELLINGS, Once, done, fixture_of, new_id
from support.project.models import Row

from celery_alchemy.strategies.features import completed
from celery_alchemy.strategies.features.completed_table import chosen_completed_table
from celery_alchemy.workers.exactly_once import runner

place = fixture_of(BOTH_SPELLINGS)
RETRIED: dict[str, Any] = {"autoretry_for": (Exception,), "max_retries": None, "exactly_once": True, "acks_late": True}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GIVES_BACK_AFTER_S", 0.2)
    monkeypatch.setattr(runner, "WAITS_FOR_RESULT_S", 0.1)
    monkeypatch.setattr(runner, "RUNS_FOR_S", 0.0)


def checked_out(once: Once) -> int:
    strategies = filter(None, (once.db.strategy, once.db.coroutines.started))
    return sum(engine.pool.checkedout() for strategy in strategies for engine in strategy.engines_made())


def test_another_one_runs(once: Once, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    pause = runner.pause

    def looking(seconds: float) -> None:
        held.append(checked_out(once))
        pause(seconds)

    monkeypatch.setattr(runner, "pause", looking)

    @once.task(**RETRIED)
    async def work(self: Any) -> str:
        self.db.add(Row(key=key))
        await done(self.db.flush())
        return "done"

    task_id, table = new_id(), chosen_completed_table(None)
    with once.database.engine.connect() as other:
        other = other.execution_options(isolation_level="READ COMMITTED")  # noqa: PLW2901 - this one in a transaction
        completed.write(other, table, completed.Key(task_id), "work", None, waits=False)
        state, error = once.deliver(work, task_id=task_id)
    assert set(held) == {0}
    assert isinstance(error, Reject)
    assert (state, error.requeue) == ("REJECTED", True)
    # Celery logs it with its traceback: the statement that has found the row taken is no error to look into.
    assert "INSERT" not in "".join(traceback.format_exception(error))
    assert once.deliver(work, task_id=task_id) == ("SUCCESS", "done")


@pytest.mark.parametrize("may_run", [True, False])
def test_its_result_is_lost(once: Once, key: str, monkeypatch: pytest.MonkeyPatch, may_run: bool) -> None:
    @once.task(**RETRIED)
    async def work(self: Any) -> str:
        self.db.add(Row(key=key))
        await done(self.db.commit())
        raise SystemExit  # as if its process were killed now

    task_id = new_id()
    with pytest.raises(SystemExit):
        once.deliver(work, task_id=task_id)
    if may_run:
        monkeypatch.setattr(runner, "RUNS_FOR_S", 600.0)
    state, error = once.deliver(work, task_id=task_id)
    assert (state, type(error).__name__) == (("REJECTED", "GivenBack") if may_run else ("FAILURE", "ResultLost"))
    assert once.database.rows(key) == [""]
