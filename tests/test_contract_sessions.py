"""Which Session a task has, for every strategy under every worker pool."""

import pytest
from support.databases import Database
from support.worker import Worker


def test_a_task_that_touches_no_database_opens_nothing(worker: Worker) -> None:
    """The worker had started and run one when the server was asked."""
    assert worker.connections_when_untouched == []


@pytest.mark.def_only  # of coroutines there is one
def test_the_strategy_in_force_is_the_configured_one(worker: Worker) -> None:
    """In every process; and `db.strategy` says who chose it, and for which worker pool."""
    for report in worker.probe():
        assert (report["strategy"], report["worker_pool"]) == (worker.strategy, worker.pool)
        assert "alchemy_session_strategy" in report["reason"]


def test_on_engine_reaches_every_engine_before_its_first_connection(worker: Worker) -> None:
    """Once, in the process that uses it."""
    assert [report["listened"] for report in worker.probe()] == [1] * (2 if worker.pool == "prefork" else 1)
    outcomes = worker.call_together("set_by_listener", [()] * 4)
    assert [outcome.value for outcome in outcomes] == ["was here"] * 4, outcomes


@pytest.mark.worker_pools("prefork", "threads", "gevent", "eventlet")
def test_concurrent_tasks_never_share_a_session(worker: Worker, key: str, database: Database) -> None:
    """All are inside a transaction at once; Session and connection stay one task's own from first to last."""
    parties = worker.concurrency
    outcomes = worker.call_together("meet", [(key, parties)] * parties)
    reports = [outcome.value for outcome in outcomes]
    assert all(report and report["same"] and report["own rows only"] for report in reports), outcomes
    assert len({report["backend"] for report in reports}) == parties
    if worker.pool != "prefork":  # two processes may give two objects the same id
        assert len({report["session"] for report in reports}) == parties
    assert len(set(database.rows(key))) == parties


@pytest.mark.worker_pools("solo")
def test_tasks_in_turn_have_a_session_each(worker: Worker, key: str) -> None:
    """Nothing of the first is left for the second."""
    first, second = (worker.call("meet", f"{key}{turn}", 1).value for turn in range(2))
    assert first["own rows only"]
    assert second["own rows only"]


def test_db_session_is_the_tasks_session_down_the_call_stack(worker: Worker, key: str, database: Database) -> None:
    assert worker.call("down_the_stack", key).value == {"same": True, "seen by self.db": ["db.session"]}
    assert database.rows(key) == ["db.session"]


def test_db_session_alone_opens_the_tasks_session(worker: Worker, key: str, database: Database) -> None:
    assert worker.call("session_only", key).state == "SUCCESS"
    assert database.rows(key) == ["db.session"]


def test_outside_any_unit_of_work_there_is_no_session(worker: Worker, key: str, database: Database) -> None:
    """A plain task, not a DatabaseTask; the error says what to use."""
    outcome = worker.call("plain", key)
    assert outcome.error == "NoUnitOfWork"
    assert "unit_of_work" in outcome.message
    assert worker.call("plain_with_unit", key).state == "SUCCESS"
    assert database.rows(key) == ["unit of a plain task"]


@pytest.mark.def_only("to_thread")  # by asyncio.run(), which no coroutine can call
@pytest.mark.parametrize("kind", ["thread", "executor", "context_thread", "to_thread", "greenlet"])
def test_what_a_task_starts_has_no_session(worker: Worker, key: str, database: Database, kind: str) -> None:
    """In a thread, executor, copied context, asyncio.to_thread or greenlet `self.db` and `db.session` raise."""
    outcome = worker.call("helper", key, kind)
    assert outcome.state == "SUCCESS", outcome
    for message in outcome.value:
        assert message.startswith("NoUnitOfWork"), message
        assert "unit_of_work" in message
    assert database.rows(key) == ["the task's own"]


@pytest.mark.worker_pools("gevent", "eventlet")
def test_a_greenlet_of_the_worker_pools_library_has_no_session(worker: Worker, key: str, database: Database) -> None:
    test_what_a_task_starts_has_no_session(worker, key, database, worker.pool)


@pytest.mark.def_only  # test_async_tasks has the children of coroutines
@pytest.mark.parametrize("kind", ["thread", "context_thread", "to_thread"])
def test_what_a_task_starts_may_open_a_unit_of_work(worker: Worker, key: str, database: Database, kind: str) -> None:
    outcome = worker.call("helper_with_unit", key, kind)
    assert outcome.error == "RuntimeError", outcome
    assert database.rows(key) == ["the helper's own"]


def test_concurrent_increments_are_all_counted(worker: Worker, key: str, database: Database) -> None:
    """Read, modify, write, under a row lock."""
    database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=key)
    outcomes = worker.call_together("increment", [(key,)] * 20)
    assert sorted(outcome.value for outcome in outcomes) == list(range(1, 21)), outcomes
    assert database.column("SELECT value FROM counters WHERE key_ = :key", key=key) == [20]
