"""What makes a copy dangerous, a test each: see also test_isolation.py (losing in each isolation level) and
test_once_kills.py (links, chains, chords, and what the main process acknowledges)."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import group
from celery.exceptions import Reject
from sqlalchemy import text
from support import databases
from support.exactly_once import Once, new_id
from support.project.models import Row

from celery_alchemy import DatabaseTask
from celery_alchemy.strategies.features.completed import Key
from celery_alchemy.workers.errors import ConfigurationError
from celery_alchemy.workers.exactly_once import choosing, chords, ids, requests, runner


def sent_by(once: Once) -> list[tuple[str, str]]:
    """Return a list of what is sent from now on: the name and the id of each message."""
    sent: list[tuple[str, str]] = []

    def send_task(name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        sent.append((name, options["task_id"]))
        return once.app.AsyncResult(options["task_id"])

    once.app.send_task = send_task
    return sent


def test_1_links_have_the_same_ids_at_each_delivery(once: Once) -> None:
    sent = sent_by(once)

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True, name="work")
    def work(self: Any) -> int:
        return 1

    @once.app.task(name="linked")
    def linked(value: int) -> None: ...

    plain = dict(linked.s())
    whole = dict(group(linked.s(), linked.s()))
    task_id = new_id()
    for _ in range(2):
        callbacks = [dict(plain), {**plain, "options": {}}]
        once.deliver(work, task_id=task_id, callbacks=callbacks, redelivered=True)
    assert len(sent) == 4
    assert sent[:2] == sent[2:]
    assert sent[0] != sent[1]
    fixed = [ids.derived(Key("a"), "callbacks", number) for number in range(2)]
    assert len(set(fixed)) == 2
    ids.fix(whole, Key("a"), "callbacks", 0)
    assert [one["options"]["task_id"] for one in whole["kwargs"]["tasks"]] == [
        ids.derived(Key("a"), "callbacks", 0, "tasks", number) for number in range(2)
    ]


def test_3_and_4_the_main_process_gives_back_what_was_lost(once: Once) -> None:
    class Request(requests.OnceRequest):
        def __init__(self, task: Any) -> None:
            self._task = task

        task = property(lambda self: self._task)  # type: ignore[assignment]
        ignore_result = True

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True, acks_late=True, reject_on_worker_lost=True)
    def work(self: Any) -> None: ...

    assert work.Request == "celery_alchemy.workers.exactly_once.requests:OnceRequest"
    assert Request(work)._success_was_stored() is False


def test_6_a_timeout_while_it_waits_gives_the_message_back(
    once: Once, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "GIVES_BACK_AFTER_S", 0.2)
    entered, leave = threading.Event(), threading.Event()

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True, acks_late=True)
    def work(self: Any) -> str:
        self.db.add(Row(key=key))
        self.db.flush()
        entered.set()
        leave.wait(20)
        return "done"

    task_id, found = new_id(), []
    thread = threading.Thread(target=lambda: found.append(once.deliver(work, task_id=task_id)))
    thread.start()
    assert entered.wait(20)
    try:
        state, reason = once.deliver(work, task_id=task_id)
        assert state == "REJECTED"
        assert isinstance(reason, Reject)
        assert reason.requeue
    finally:
        leave.set()
        thread.join(20)
    assert found == [("SUCCESS", "done")]
    assert once.deliver(work, task_id=task_id) == ("SUCCESS", "done")
    assert once.database.rows(key) == [""]


def test_6_a_winner_that_fails_lets_the_copy_run_as_often_as_it_takes(once: Once, key: str) -> None:
    ends = [ValueError("no")] * 4

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True, isolation_retries=1)
    def work(self: Any) -> str:
        self.db.add(Row(key=key))
        self.db.flush()
        if ends:
            raise ends.pop()
        return "done"

    results = once.at_once(work, task_id=new_id(), copies=6)
    states = [state for state, _ in results]
    # Who has failed looks whether another copy has won by then.
    assert states.count("FAILURE") <= 4
    assert [result for state, result in results if state != "FAILURE"] == ["done"] * (6 - states.count("FAILURE"))
    assert once.database.rows(key) == [""]


def test_a_task_that_has_committed_and_still_runs_fails_no_copy(
    once: Once, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "WAITS_FOR_RESULT_S", 0.1)

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True, acks_late=True)
    def work(self: Any) -> str:
        self.db.add(Row(key=key))
        self.db.commit()
        raise SystemExit  # as if its process were killed now

    task_id = new_id()
    with pytest.raises(SystemExit):
        once.deliver(work, task_id=task_id)
    assert once.deliver(work, task_id=task_id)[0] == "REJECTED"
    monkeypatch.setattr(runner, "RUNS_FOR_S", 0.0)
    state, error = once.deliver(work, task_id=task_id)
    assert (state, type(error).__name__) == ("FAILURE", "ResultLost")
    assert once.database.rows(key) == [""]


def test_a_result_that_is_lost_and_that_nobody_reads_is_no_failure(
    once: Once, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "WAITS_FOR_RESULT_S", 0.1)

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True)
    def work(self: Any) -> str:
        self.db.add(Row(key=key))
        self.db.commit()
        raise SystemExit  # as if its process were killed now

    task_id = new_id()
    with pytest.raises(SystemExit):
        once.deliver(work, task_id=task_id, ignore_result=True)
    # Acknowledged early, and it may still run: the copy says nothing.
    assert once.deliver(work, task_id=task_id)[0] == "IGNORED"
    monkeypatch.setattr(runner, "RUNS_FOR_S", 0.0)
    assert once.deliver(work, task_id=task_id, ignore_result=True) == ("SUCCESS", None)
    assert once.database.rows(key) == [""]


@pytest.mark.parametrize("mode", ["first", "last"])
def test_6_a_copy_that_waits_too_long_for_a_lock_runs_again(once: Once, mode: Any, key: str) -> None:
    """Each copy wants the same row of another table; the server lets none wait for long."""
    is_postgresql = once.database.engine.dialect.name == "postgresql"
    limit = "SET LOCAL lock_timeout = '50ms'" if is_postgresql else "SET SESSION innodb_lock_wait_timeout = 0"
    once.database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=key)

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode)
    def work(self: Any) -> str:
        self.db.execute(text(limit))
        self.db.execute(text("UPDATE counters SET value = value + 1 WHERE key_ = :key"), {"key": key})
        threading.Event().wait(0.15)
        return "done"

    assert once.at_once(work, task_id=new_id(), copies=3) == [("SUCCESS", "done")] * 3
    assert once.database.column("SELECT value FROM counters WHERE key_ = :key", key=key) == [1]


def test_6_a_statement_timeout_where_the_row_goes_with_the_commit(once: Once, key: str) -> None:
    """The copy that comes second waits for the first one's row in its COMMIT, and is cut off there."""
    is_postgresql = once.database.engine.dialect.name == "postgresql"
    limit = "SET LOCAL statement_timeout = '80ms'" if is_postgresql else "SET SESSION innodb_lock_wait_timeout = 0"
    task_id = new_id()

    @once.app.task(base=DatabaseTask, bind=True, exactly_once="last")
    def work(self: Any) -> str:
        self.db.add(Row(key=key))
        self.db.flush()
        self.db.execute(text(limit))
        return "done"

    with once.database.engine.connect() as first:  # a copy whose COMMIT takes long
        first = first.execution_options(isolation_level="READ COMMITTED")  # noqa: PLW2901 - this one in a transaction
        first.execute(
            text("INSERT INTO celery_alchemy_completed (task_id, nesting, task, completed_at) VALUES (:i, 0, 'x', 0)"),
            {"i": task_id},
        )
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(once.deliver(work, task_id=task_id)))
        thread.start()
        thread.join(0.6)
        assert found == []
        first.rollback()
        thread.join(20)
    assert found == [("SUCCESS", "done")]
    assert once.database.rows(key) == [""]


def test_12_a_very_large_result(once: Once, key: str) -> None:
    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True)
    def work(self: Any) -> str:
        self.db.add(Row(key=key))
        return "x" * 5_000_000

    task_id = new_id()
    for _ in range(2):
        state, found = once.deliver(work, task_id=task_id)
        assert (state, len(found)) == ("SUCCESS", 5_000_000)
    assert once.database.rows(key) == [""]


@pytest.mark.parametrize(
    ("version", "ordered", "is_right"), [((5, 5), False, False), ((5, 5), True, True), ((5, 7), False, True)]
)
def test_8_a_backend_that_counts_deliveries_is_refused(
    once: Once, monkeypatch: pytest.MonkeyPatch, version: Any, ordered: bool, is_right: bool
) -> None:
    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True)
    def work(self: Any) -> None: ...

    monkeypatch.setattr(chords, "VERSION", (*version, 0))
    once.app.conf.update(
        result_backend="redis://localhost", result_backend_transport_options={"result_chord_ordered": ordered}
    )
    once.app.finalize()
    with (
        contextlib.nullcontext() if is_right else pytest.raises(ConfigurationError, match="result_chord_ordered=False")
    ):
        choosing.prepare_worker(once.app, once.db.settings)


def test_9_what_it_was_replaced_by_is_sent_again(once: Once, key: str) -> None:
    sent = sent_by(once)

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True, name="other")
    def other(self: Any) -> None: ...

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True, name="work")
    def work(self: Any) -> Any:
        self.db.add(Row(key=key))
        return self.replace(other.s())

    task_id = new_id()
    for _ in range(2):
        assert once.deliver(work, task_id=task_id)[0] == "IGNORED"
    assert sent == [("other", task_id)] * 2
    assert once.database.rows(key) == [""]
    once.deliver(other, task_id=task_id, replaced_task_nesting=1)
    assert [row[0] for row in once.recorded(task_id)] == [0, 1]


def test_10_slow_work_before_the_first_statement_holds_no_connection(once: Once, key: str) -> None:
    found = []

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True)
    def work(self: Any) -> None:
        found.append(once.db.engine.pool.checkedout())
        self.db.add(Row(key=key))
        found.append(once.db.engine.pool.checkedout())

    once.deliver(work, task_id=new_id())
    assert found == [0, 0]


def test_12_what_cannot_be_encoded_and_nobody_reads(once: Once, key: str) -> None:
    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True, ignore_result=True)
    def work(self: Any) -> Any:
        self.db.add(Row(key=key))
        return object()

    task_id = new_id()
    assert once.deliver(work, task_id=task_id)[0] == "SUCCESS"
    assert once.deliver(work, task_id=task_id) == ("SUCCESS", None)


def test_12_results_that_are_no_text(once: Once, key: str) -> None:
    once.app.conf.update(result_serializer="pickle", result_accept_content=["pickle"])

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True)
    def work(self: Any) -> Any:
        self.db.add(Row(key=key))
        return {1, 2}

    task_id = new_id()
    assert [once.deliver(work, task_id=task_id) for _ in range(2)] == [("SUCCESS", {1, 2})] * 2
    assert once.database.rows(key) == [""]


def test_12_eager_tasks_and_calls_record_nothing(once: Once, key: str) -> None:
    class Own(DatabaseTask):
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    for number, base in enumerate((DatabaseTask, Own), 1):

        @once.app.task(base=base, bind=True, exactly_once=True, name=f"inner{number}")
        def inner(self: Any) -> int:
            self.db.add(Row(key=key))
            return 1

        @once.app.task(base=DatabaseTask, bind=True, exactly_once=True, name=f"outer{number}")
        def outer(self: Any) -> int:
            eager = [inner.apply(task_id=f"eager-{key}").get(disable_sync_subtasks=False) for _ in range(2)]
            return inner() + inner() + sum(eager)

        task_id = new_id()
        assert once.deliver(outer, task_id=task_id) == ("SUCCESS", 4)
        assert once.recorded(f"eager-{key}") == once.recorded("None") == []
        assert len(once.recorded(task_id)) == 1
        assert inner() + inner() + inner.run() == 3  # where no request runs
        assert once.recorded("None") == []
        assert len(once.database.rows(key)) == 7 * number


def test_a_task_that_swallows_everything_is_still_overtaken(once: Once, key: str) -> None:
    """The copy that comes second catches the error of its first statement, and goes on."""

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True)
    def work(self: Any) -> str:
        try:
            self.db.execute(text("SELECT 1"))
            self.db.add(Row(key=key))
            self.db.flush()
        except Exception:
            self.db.rollback()
        return "done"

    for _ in range(5):
        before = len(once.database.rows(key))
        assert once.at_once(work, task_id=new_id(), copies=3) == [("SUCCESS", "done")] * 3
        assert len(once.database.rows(key)) == before + 1


def test_its_own_call_runs_around_it(once: Once, key: str) -> None:
    class Own(DatabaseTask):
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return [super().__call__(*args, **kwargs)]

    @once.app.task(base=Own, bind=True, exactly_once=True)
    def work(self: Any) -> int:
        self.db.add(Row(key=key))
        return 1

    task_id = new_id()
    assert [once.deliver(work, task_id=task_id) for _ in range(2)] == [("SUCCESS", [1])] * 2
    assert {state for state, _ in once.at_once(work, task_id=new_id(), copies=3)} == {"SUCCESS"}
    assert len(once.database.rows(key)) == 2


@pytest.fixture
def sqlite(tmp_path: Any) -> Iterator[Once]:
    with databases.new_sqlite(tmp_path / "once.sqlite3") as database:
        once = Once(database)
        yield once
        once.close()


@pytest.mark.parametrize("mode", ["first", "last"])
def test_on_sqlite(sqlite: Once, mode: Any, key: str) -> None:
    @sqlite.app.task(base=DatabaseTask, bind=True, exactly_once=mode)
    def work(self: Any) -> str:
        self.db.add(Row(key=key))
        self.db.flush()
        return "done"

    for number in range(3):
        assert sqlite.at_once(work, task_id=new_id()) == [("SUCCESS", "done")] * 2
        assert len(sqlite.database.rows(key)) == number + 1
