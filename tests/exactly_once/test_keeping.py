"""What is kept of completed tasks: how it is forgotten and pruned, who looks at it, and what is refused."""

import contextlib
import json
import logging
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery.bin.celery import celery as command
from click.testing import CliRunner
from sqlalchemy import MetaData, text
from support import preloaded
from support.exactly_once import TABLE, Once, new_id
from support.project.models import Row

from celery_alchemy import (
    CeleryAlchemyError,
    ConfigurationError,
    DatabaseTask,
    NoUnitOfWork,
    completed_tasks_table,
)
from celery_alchemy.strategies.errors import InvalidSetting
from celery_alchemy.workers.doctor import examine as doctor
from celery_alchemy.workers.doctor.fleet import Fleet
from celery_alchemy.workers.exactly_once import pruning


def make_task(once: Once, key: str, **options: Any) -> Any:
    @once.app.task(base=DatabaseTask, bind=True, **{"name": "create", "exactly_once": True, **options})
    def create(self: Any) -> str:
        self.db.add(Row(key=key))
        return "done"

    return create


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the code, and the doctor would read every module of tests that is imported."""
    monkeypatch.setattr(doctor, "files_of", lambda app: {})


def test_what_is_forgotten_runs_again(once: Once, key: str) -> None:
    create, task_id = make_task(once, key), new_id()
    once.deliver(create, task_id=task_id)
    assert once.db.forget(task_id) == 1
    assert once.db.forget(task_id) == 0
    once.deliver(create, task_id=task_id)
    assert len(once.database.rows(key)) == 2


def test_an_id_that_is_used_again_is_told(once: Once, key: str, caplog: pytest.LogCaptureFixture) -> None:
    create, task_id = make_task(once, key), new_id()
    once.deliver(create, task_id=task_id)
    once.deliver(create, task_id=task_id, redelivered=True)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    once.deliver(create, task_id=task_id)
    assert f"db.forget({task_id!r})" in caplog.text


def test_a_task_cannot_forget_itself(once: Once) -> None:
    """On MariaDB it waited for its own transaction, on PostgreSQL it forgot nothing."""

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True)
    def work(self: Any, other: str) -> int:
        self.db.execute(text("SELECT 1"))
        with pytest.raises(CeleryAlchemyError, match="by the task with this id"):
            once.db.forget(self.request.id)
        return once.db.forget(other)

    assert once.deliver(work, new_id(), task_id=new_id()) == ("SUCCESS", 0)


def test_a_task_that_is_not_recorded_may_forget_its_own_id(once: Once, key: str) -> None:
    """It had `exactly_once` before."""

    @once.app.task(base=DatabaseTask, bind=True)
    def work(self: Any) -> int:
        return once.db.forget(self.request.id)

    task_id = new_id()
    once.deliver(make_task(once, key), task_id=task_id)
    assert once.deliver(work, task_id=task_id) == ("SUCCESS", 1)


def test_what_is_to_be_forgotten_where_there_is_no_table(once: Once) -> None:
    once.app.conf.alchemy_completed_table = "not_there"
    with pytest.raises(ConfigurationError, match="CREATE TABLE not_there"):
        once.db.forget(new_id())


def test_ids_that_differ_in_case_or_are_long_are_others(once: Once, key: str) -> None:
    create = make_task(once, key)
    for task_id in ("abc", "ABC", "x" * 300 + "1", "x" * 300 + "2", "ä"):
        for _ in range(2):
            assert once.deliver(create, task_id=f"{task_id}-{key}" if len(task_id) < 9 else task_id + key)[1] == "done"
    assert len(once.database.rows(key)) == 5


def test_ids_that_end_in_a_space_or_are_long(once: Once, key: str, caplog: pytest.LogCaptureFixture) -> None:
    """MySQL compares without the spaces at the end, the column holds 255 characters, and PostgreSQL keeps no NUL. No
    database keeps half a surrogate pair; Celery cannot store a result under such an id."""
    caplog.set_level(logging.CRITICAL, "celery_alchemy")  # pytest could not pass such an id on
    create = make_task(once, key)
    for task_id in (key, f"{key} ", f"{key}  ", key + "x" * 300, f"{key}\0", f"{key}\ud800"):
        for _ in range(2):
            assert once.deliver(create, task_id=task_id, ignore_result=True)[1] == "done"
        assert once.db.forget(task_id) == 1
        once.deliver(create, task_id=task_id, ignore_result=True)
    assert len(once.database.rows(key)) == 12


@pytest.mark.parametrize("mode", ["first", "last"])
def test_the_name_of_a_task_may_be_longer_than_its_column(once: Once, mode: Any, key: str) -> None:
    create, task_id = make_task(once, key, exactly_once=mode, name="n" * 300), new_id()
    for _ in range(2):
        assert once.deliver(create, task_id=task_id) == ("SUCCESS", "done")
    assert once.database.column(f"SELECT task FROM {TABLE} WHERE task_id = :i", i=task_id) == ["n" * 255]


def test_the_key_is_the_same_for_each_delivery_and_of_no_other_task(once: Once) -> None:
    keys = []

    @once.app.task(base=DatabaseTask, bind=True)
    def pay(self: Any) -> None:
        keys.append(once.db.idempotency_key)

    for task_id, retries in (("one", 0), ("one", 1), ("two", 0)):
        once.deliver(pay, task_id=task_id, retries=retries)
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(NoUnitOfWork):
        _ = once.db.idempotency_key


def test_old_rows_go_with_new_ones(once: Once, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "AFTER_ROWS", 3)
    monkeypatch.setattr(random, "randrange", lambda most: 0)
    create, ids = make_task(once, key), [new_id() for _ in range(5)]
    for number, task_id in enumerate(ids):
        once.deliver(create, task_id=task_id)
        if number == 0:
            once.database.execute(f"UPDATE {TABLE} SET completed_at = 0 WHERE task_id = :i", i=task_id)
    assert [bool(once.recorded(task_id)) for task_id in ids] == [False, True, True, True, True]


def test_the_commands_show_and_prune(once: Once, key: str) -> None:
    create, ids = make_task(once, key), [new_id() for _ in range(3)]
    for task_id in ids:
        once.deliver(create, task_id=task_id)
    once.database.execute(f"UPDATE {TABLE} SET completed_at = 5 WHERE task_id = :i", i=ids[0])
    context = type("Context", (), {"app": once.app})()

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(command.get_command(None, "alchemy"), ["completed", *arguments], obj=context)

    shown = json.loads(run("list", "--json", *ids).output)
    assert {row["task_id"] for row in shown} == set(ids)
    assert f"create[{ids[1]}]" in run("list", "--task", "create").output
    assert run("prune", "--older-than", "3000 years").exit_code == 2
    assert "1 row deleted" in run("prune", "--older-than", "30d").output
    assert [len(once.recorded(task_id)) for task_id in ids] == [0, 1, 1]
    once.app.conf.broker_url = "redis://localhost"
    assert "visibility timeout" in run("prune", "--older-than", "1h").output


@pytest.mark.usefixtures("no_code")
def test_a_table_that_is_missing_is_told_with_the_remedy(once: Once, key: str) -> None:
    once.app.conf.alchemy_completed_table = "not_there"
    create = make_task(once, key)
    state, error = once.deliver(create, task_id=new_id())
    assert state == "FAILURE"
    assert isinstance(error, ConfigurationError)
    assert "CREATE TABLE" in str(error)
    assert "completed_tasks_table(Base.metadata)" in str(error)
    assert once.database.rows(key) == []
    found = doctor.examine(once.app, pool="solo", concurrency=1, fleet=Fleet(1, 1), connect=True)
    assert "completed-table" in {finding.code for finding in found.findings}


def test_another_name_and_schema() -> None:
    table = completed_tasks_table(MetaData(), "done", schema="shop")
    try:
        assert table.fullname == "shop.done"
    finally:
        del table  # it is declared as long as it lives
        import gc

        gc.collect()


def test_the_setting_is_for_all_that_write(once: Once, key: str) -> None:
    once.app.conf.alchemy_exactly_once = "last"
    create, task_id = make_task(once, key, exactly_once=None), new_id()

    @once.app.task(base=DatabaseTask, bind=True, read_only=True)
    def read(self: Any) -> int:
        return 1

    for _ in range(2):
        assert once.deliver(create, task_id=task_id) == ("SUCCESS", "done")
        assert once.deliver(read, task_id="read" + task_id) == ("SUCCESS", 1)
    assert len(once.database.rows(key)) == 1
    assert once.recorded("read" + task_id) == []


def test_a_retry_after_an_early_commit_is_refused(once: Once, key: str) -> None:
    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True)
    def create(self: Any) -> None:
        self.db.add(Row(key=key))
        self.db.commit()
        raise self.retry()

    state, error = once.deliver(create, task_id=new_id())
    assert state == "FAILURE"
    assert "retries after self.db.commit()" in str(error)


@pytest.mark.usefixtures("no_code")
def test_the_doctor_proposes_it_and_looks_at_how_long_rows_are_kept(once: Once, key: str) -> None:
    create = make_task(once, key, exactly_once=False, acks_late=True, time_limit=7200)
    once.app.conf.broker_url = "redis://localhost"

    def codes() -> dict[str, str]:
        found = doctor.examine(once.app, pool="solo", concurrency=1, fleet=Fleet(1, 1), connect=False)
        return {finding.code: finding.remedy for finding in found.findings}

    assert "exactly_once=True" in codes()["runs-twice"]
    once.app.tasks[create.name].__class__.exactly_once = True
    assert "runs-twice" not in codes()
    assert "forgotten-early" not in codes()
    once.app.conf.alchemy_completed_kept_s = 3600
    assert "forgotten-early" in codes()


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize(("kept_s", "is_early"), [(150, True), (200, True), (201, False)])
def test_the_doctor_wants_rows_kept_for_twice_the_visibility_timeout(
    once: Once, key: str, kept_s: int, is_early: bool
) -> None:
    """Or twice the pause after which the outbox sends a message again."""
    make_task(once, key, acks_late=True)
    once.app.conf.update(broker_url="redis://localhost", broker_transport_options={"visibility_timeout": 100})
    once.app.conf.alchemy_completed_kept_s = kept_s
    found = doctor.examine(once.app, pool="solo", concurrency=1, fleet=Fleet(1, 1), connect=False)
    assert ("forgotten-early" in {finding.code for finding in found.findings}) is is_early
    once.app.conf.update(broker_url="memory://", alchemy_outbox="relay", alchemy_outbox_resend_s=100)
    once.db._settings = None
    found = doctor.examine(once.app, pool="solo", concurrency=1, fleet=Fleet(1, 1), connect=False)
    assert ("forgotten-early" in {finding.code for finding in found.findings}) is is_early


@pytest.mark.usefixtures("no_code")
def test_the_doctor_looks_at_what_loses_a_task_or_its_messages(once: Once, key: str) -> None:
    create = make_task(once, key, exactly_once=True, time_limit=60)
    once.app.conf.broker_url = "redis://localhost"
    once.app.conf.alchemy_outbox = True

    def codes(pool: str = "prefork", **settings: Any) -> set[str]:
        once.app.conf.update(settings)
        once.db._settings = None
        found = doctor.examine(once.app, pool=pool, concurrency=1, fleet=Fleet(1, 1), connect=False)
        return {finding.code for finding in found.findings} & {"once-acks-early", "resent-early", "not-resent"}

    assert codes() == {"once-acks-early"}
    create.acks_late = True
    assert codes() == {"once-acks-early"}
    assert codes("threads") == set()
    create.reject_on_worker_lost = True
    assert codes(alchemy_outbox_resend_s=3600) == {"resent-early"}
    assert codes(alchemy_outbox_resend_s=0) == {"not-resent"}
    assert codes(alchemy_outbox_resend_s=3601) == set()


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize(
    ("backend", "polls"),
    [
        ("db+sqlite://", True), ("rpc://", True), ("cache+memory://", False), ("redis://localhost", False),
        ("alchemy://", False), (None, False),
    ],
)  # fmt: skip
def test_the_doctor_looks_at_what_waits_for_the_members_of_a_chord(
    once: Once, key: str, backend: str | None, polls: bool
) -> None:
    """It is Celery's own task, which acks_late on the tasks themselves does not reach."""
    make_task(once, key, exactly_once=True, acks_late=True)
    once.app.conf.result_backend = backend
    unlock = once.app.tasks["celery.chord_unlock"]

    def codes(pool: str = "solo") -> set[str]:
        found = doctor.examine(once.app, pool=pool, concurrency=1, fleet=Fleet(1, 1), connect=False)
        return {finding.code for finding in found.findings} & {"chord-acks-early"}

    early = {"chord-acks-early"} if polls else set()
    assert codes() == early
    unlock.acks_late = True
    assert (codes(), codes("prefork")) == (set(), early)
    unlock.reject_on_worker_lost = True
    assert codes("prefork") == set()


@pytest.mark.usefixtures("no_code")
def test_the_doctor_looks_for_it_where_results_are_kept_there(once: Once) -> None:
    def codes() -> set[str]:
        found = doctor.examine(once.app, pool="solo", concurrency=1, fleet=Fleet(1, 1), connect=True)
        return {finding.code for finding in found.findings}

    once.app.conf.alchemy_completed_table = "not_there"
    assert "completed-table" not in codes()  # nothing needs it
    once.app.conf.result_backend = "alchemy://"
    assert "completed-table" in codes()


def test_old_rows_go_however_soon_a_process_ends() -> None:
    """With `worker_max_tasks_per_child` below a hundred no process would ever have deleted one."""
    random.seed(18)
    pruned: list[float] = []
    rows = SimpleNamespace(prune_some=lambda kept_s, most: pruned.append(kept_s))
    for _ in range(400):
        process = pruning.Pruning(rows, 7.0)  # type: ignore[arg-type]
        for _ in range(25):
            process.recorded()
    assert 60 < len(pruned) < 140  # once in a hundred rows


@pytest.mark.parametrize("mode", ["first", "last"])
@pytest.mark.parametrize("says", ["engine", "execution_options", "driver", "task"])
def test_autocommit_is_refused(place: Any, key: str, says: str, mode: Any) -> None:
    """The row would be committed before the work: a body that fails then would be taken for one that has completed."""
    options = {
        "engine": {"isolation_level": "AUTOCOMMIT"},
        "execution_options": {"execution_options": {"isolation_level": "AUTOCOMMIT"}},
        "driver": {"connect_args": {"autocommit": True}},
    }
    if says == "driver" and "psycopg2" in place[1]["alchemy_database_url"]:
        pytest.skip("psycopg2 has no such argument")
    once = Once(place[0], **place[1], alchemy_engine_options=options.get(says, {}))
    try:

        @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode)
        def create(self: Any) -> None:
            if says == "task":
                with contextlib.suppress(InvalidSetting):
                    self.db.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            self.db.add(Row(key=key))
            self.db.flush()
            if says != "task":
                raise KeyError(key)

        task_id = new_id()
        for _ in range(2):
            state, error = once.deliver(create, task_id=task_id)
            assert (state, type(error)) in {("FAILURE", InvalidSetting), ("FAILURE", KeyError)}
        assert once.recorded(task_id) == []
    finally:
        once.close()


@pytest.mark.parametrize("says", ["alchemy_outbox is set", "Tasks have exactly_once"])
@pytest.mark.parametrize("where", ["engine", "execution_options"])
def test_a_worker_in_autocommit_does_not_start(tmp_path: Path, says: str, where: str) -> None:
    level = {"isolation_level": "AUTOCOMMIT"}
    settings = {
        "alchemy_database_url": "postgresql+psycopg://127.0.0.1:1/shop",
        "alchemy_engine_options": level if where == "engine" else {where: level},
        "alchemy_exactly_once" if "exactly_once" in says else "alchemy_outbox": True,
    }
    (tmp_path / "shop.py").write_text(
        "from celery import Celery\n"
        "from celery_alchemy import Alchemy, DatabaseTask\n"
        "app = Celery('shop', broker='memory://')\n"
        f"app.conf.update({settings!r})\n"
        "db = Alchemy(app)\n"
        "@app.task(base=DatabaseTask)\n"
        "def create(): ...\n"
    )
    command = [sys.executable, "-m", "celery", "-A", "shop", "worker", "--pool=solo"]
    done = preloaded.run(command, cwd=tmp_path, env={**os.environ, "C_FORCE_ROOT": "1"}, timeout=250)
    assert done.returncode == 1, done.stderr
    assert f"{says}, and alchemy_engine_options say isolation_level='AUTOCOMMIT'" in done.stderr
    assert "Traceback" not in done.stderr
