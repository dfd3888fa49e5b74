"""Every way to define a task: a unit of work each, in a worker, eagerly and called like a function."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task
from celery.exceptions import ImproperlyConfigured
from celery.signals import task_retry
from pydantic import ValidationError
from support import definitions
from support.apps import Isolated, make_app
from support.databases import PostgreSQL, SQLite, assert_no_connections, new_sqlite
from support.definitions import NAMES, Refused, arguments, define, write
from support.worker import Site, Worker, running

from celery_alchemy import Alchemy, ConfigurationError, DatabaseTask


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[SQLite]:
    with new_sqlite(tmp_path / "test.db") as database:
        yield database


@pytest.fixture
def defined(sqlite: SQLite) -> Iterator[Celery]:
    """An app in which everything is defined; no worker."""
    app, db = make_app(sqlite.url(""))
    define(app, db)
    app.finalize()
    yield app
    assert db.engine.pool.checkedout() == 0
    db.dispose()


@pytest.mark.parametrize("name", NAMES)
def test_applied_eagerly_it_is_a_unit_of_work(defined: Celery, sqlite: SQLite, key: str, name: str) -> None:
    task = defined.tasks[name]
    assert task.apply(args=arguments(name, key, False)).successful()
    assert sqlite.rows(key) == ["written"]
    failed = task.apply(args=arguments(name, key, True))
    assert failed.state == "FAILURE"
    assert isinstance(failed.result, Refused)
    assert sqlite.rows(key) == ["written"]


@pytest.mark.parametrize("name", NAMES)
def test_called_like_a_function_it_is_a_unit_of_work(defined: Celery, sqlite: SQLite, key: str, name: str) -> None:
    """Where no other is open."""
    task = defined.tasks[name]
    task(*arguments(name, key, False))
    assert sqlite.rows(key) == ["written"]
    with pytest.raises(Refused):
        task(*arguments(name, key, True))
    assert sqlite.rows(key) == ["written"]


@pytest.fixture(scope="module")
def defining_worker(site: Site, database: PostgreSQL) -> Iterator[Worker]:
    name = f"{site.prefix[:-1]}-definitions"
    modules = ("defined", "sessions")
    url = database.url(name)
    with running(Worker(site, name, "threads", database_url=url, modules=modules)) as worker:
        yield worker
    assert_no_connections(database, name)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_worker_it_is_a_unit_of_work(defining_worker: Worker, database: PostgreSQL, key: str, name: str) -> None:
    outcome = defining_worker.call(name, *arguments(name, key, False))
    assert outcome.state == "SUCCESS", outcome
    assert database.rows(key) == ["written"]
    outcome = defining_worker.call(name, *arguments(name, key, True))
    assert (outcome.state, outcome.error) == ("FAILURE", "Refused"), outcome
    assert database.rows(key) == ["written"]
    assert defining_worker.probe()[0]["checkedout"] == 0


def test_a_worker_of_an_app_with_task_cls_gives_every_task_a_session(sqlite: SQLite, key: str) -> None:
    """`Celery(task_cls="celery_alchemy:DatabaseTask")`, and tasks that name no base."""
    app, db = make_app(sqlite.url(""), task_cls="celery_alchemy:DatabaseTask")

    @app.task(bind=True)
    def bound(self: Any, fails: bool) -> str:
        return write(self.db, key, fails)

    assert bound.apply(args=(False,)).successful()
    assert bound.apply(args=(True,)).state == "FAILURE"
    assert sqlite.rows(key) == ["written"]
    db.dispose()


def test_a_base_with_its_own_call_is_called_once_per_request(defined: Celery, key: str) -> None:
    for name in ("mixed_before", "mixed_after", "mixed_before_running", "mixed_after_running"):
        task = defined.tasks[name]
        before = type(task).calls
        task.apply(args=(key,))
        assert type(task).calls == before + 1, name


def test_a_call_of_the_users_that_writes_is_part_of_the_unit_of_work(
    defined: Celery, sqlite: SQLite, key: str, database: PostgreSQL, defining_worker: Worker
) -> None:
    """Committed and rolled back together with what `run` wrote."""
    defined.tasks["stamping"].apply(args=(key, True))
    assert sqlite.rows(f"{key}-stamp") == []
    defined.tasks["stamping"].apply(args=(key, False))
    assert sqlite.rows(f"{key}-stamp") == ["stamped"]
    assert defining_worker.call("stamping", key, True).error == "Refused"
    assert database.rows(f"{key}-stamp") == []
    assert defining_worker.call("stamping", key, False).state == "SUCCESS"
    assert database.rows(f"{key}-stamp") == ["stamped"]


def test_an_annotation_around_run_still_runs(defined: Celery, sqlite: SQLite, key: str) -> None:
    """And does not take the unit of work away: Celery replaces a function by its `__wrapped__` there."""
    before = len(definitions.AROUND)
    defined.tasks["annotated"].apply(args=(key,))
    assert len(definitions.AROUND) == before + 1
    assert sqlite.rows(key) == ["written"]


@pytest.mark.parametrize("name", ["autoretried", "class_based_with_retry"])
def test_autoretry_runs_it_again(defined: Celery, name: str) -> None:
    """Wrapping `run` does not hide the task's exception from `autoretry_for`."""
    retries = []

    def count(sender: Task, **_: Any) -> None:
        retries.append(sender.name)

    task_retry.connect(count)
    try:
        result = defined.tasks[name].apply(args=("key", True))
    finally:
        task_retry.disconnect(count)
    assert isinstance(result.result, Refused)
    assert retries == [name]


def test_pydantic_validates_what_the_caller_sends_and_what_the_task_returns(defined: Celery, key: str) -> None:
    assert defined.tasks["validated"].apply(args=({"key": key},)).result == {"key": key}
    assert isinstance(defined.tasks["validated"].apply(args=({"kee": key},)).result, ValidationError)


def test_celery_still_checks_arguments(defined: Celery, key: str) -> None:
    """The wrapper around `run` has the task's own signature."""
    for name in ("plain", "bound", "house", "mixed_after"):
        task = defined.tasks[name]
        with pytest.raises(TypeError, match="key"):
            task.apply_async(())
        with pytest.raises(TypeError):
            task.apply_async((key, False, "too many"))


def test_attributes_of_the_base_class_are_kept(defined: Celery) -> None:
    assert defined.tasks["house"].made
    assert defined.tasks["mixed_with_djangos"].delay_on_commit


async def a_coroutine(self: Any) -> None:
    """A task nobody would await."""


async def a_generator(self: Any) -> Any:
    yield


@pytest.mark.parametrize("function", [a_coroutine, a_generator])
def test_async_def_is_refused_at_definition(sqlite: SQLite, function: Any) -> None:
    """Celery would call it and drop the coroutine."""
    app, _ = make_app(sqlite.url(""))
    with pytest.raises(ConfigurationError, match="async def"):
        app.task(base=DatabaseTask, bind=True, name=f"x{uuid.uuid4().hex}", lazy=False)(function)


def test_an_async_run_of_a_class_is_refused_at_definition() -> None:
    with pytest.raises(ImproperlyConfigured, match="async def"):

        class Asynchronous(DatabaseTask):
            async def run(self) -> None:
                pass


def test_commit_on_success_can_be_set_in_the_decorator_the_class_and_the_settings(
    sqlite: SQLite, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The nearer one wins; a warning names the task whose work is thrown away."""

    class Careful(DatabaseTask):
        abstract = True
        commit_on_success = False

    def body(self: Any) -> None:
        write(self.db, key, False)

    app, db = make_app(sqlite.url(""))
    by_decorator = app.task(base=DatabaseTask, bind=True, commit_on_success=False, name="by_decorator")(body)
    by_class = app.task(base=Careful, bind=True, name="by_class")(body)
    decorator_wins = app.task(base=Careful, bind=True, commit_on_success=True, name="decorator_wins")(body)
    for task in (by_decorator, by_class):
        assert task.apply().successful()
        assert sqlite.rows(key) == []
        assert task.name in caplog.text
    decorator_wins.apply()
    assert sqlite.rows(key) == ["written"]
    db.dispose()

    app, db = make_app(sqlite.url(""))
    app.conf.alchemy_commit_on_success = False
    by_setting = app.task(base=DatabaseTask, bind=True, name="by_setting")(body)
    decorator_beats_setting = app.task(base=DatabaseTask, bind=True, commit_on_success=True, name="beats")(body)
    by_setting.apply()
    assert sqlite.rows(key) == ["written"]
    decorator_beats_setting.apply()
    assert sqlite.rows(key) == ["written", "written"]
    db.dispose()


def test_two_apps_in_one_process_have_a_database_each(tmp_path: Path, key: str) -> None:
    with new_sqlite(tmp_path / "one.db") as one, new_sqlite(tmp_path / "two.db") as two:
        made = [make_app(each.url("")) for each in (one, two)]
        tasks: list[Task] = []
        for app, db in made:
            define(app, db)
            tasks.append(app.tasks["bound"])
        tasks[0].apply(args=(f"{key}1",))
        tasks[1].apply(args=(f"{key}2",))
        assert (one.rows(f"{key}1"), one.rows(f"{key}2")) == (["written"], [])
        assert (two.rows(f"{key}1"), two.rows(f"{key}2")) == ([], ["written"])
        for _, db in made:
            db.dispose()


def test_the_mixins_are_what_they_claim() -> None:
    """Before means: DatabaseTask comes first in the order in which Python looks for `__call__`."""
    for before, after in (("MixedBefore", "MixedAfter"), ("MixedBeforeRunning", "MixedAfterRunning")):
        first, second = getattr(definitions, before).__mro__, getattr(definitions, after).__mro__
        assert first.index(DatabaseTask) == 1
        assert second.index(DatabaseTask) == 2


def test_db_task_is_app_task_with_our_base(sqlite: SQLite) -> None:
    app, db = make_app(sqlite.url(""))

    @db.task
    def bound(self: Any) -> Any:
        return self

    @db.task
    def plain(number: int) -> int:
        return number

    @db.task(bind=True, base=definitions.House, read_only=True)
    def named_otherwise(task: Any) -> Any:
        return task

    assert bound() is app.tasks[bound.name]
    assert plain(3) == 3
    assert named_otherwise().made
    assert app.tasks[named_otherwise.name].read_only is True


def test_db_task_without_an_app_is_a_shared_task(sqlite: SQLite) -> None:
    db = Alchemy()

    @db.task(name="of_no_app_yet")
    def task(self: DatabaseTask, key: str) -> None:
        write(self.db, key, False)

    app = Isolated("isolated", broker="memory://", set_as_current=False)
    app.conf.alchemy_database_url = sqlite.url("")
    db.init_app(app)
    app.tasks["of_no_app_yet"].apply(args=("row",)).get()
    assert sqlite.rows("row") == ["written"]
    db.dispose()


@pytest.mark.parametrize("base", [Task, object, "DatabaseTask"])
def test_db_task_with_another_base_is_refused(sqlite: SQLite, base: Any) -> None:
    _, db = make_app(sqlite.url(""))
    with pytest.raises(ConfigurationError, match="the base must be DatabaseTask, AsyncDatabaseTask"):
        db.task(base=base)


def test_db_task_of_another_database_is_refused_with_the_remedy(sqlite: SQLite) -> None:
    app, _ = make_app(sqlite.url(""))
    reports = Alchemy(app, database="reports")
    with pytest.raises(ConfigurationError, match=r"self\.session_for\('reports'\)"):
        reports.task(lambda: None)


def test_completion_shows_the_public_names(sqlite: SQLite) -> None:
    _, db = make_app(sqlite.url(""))
    shown = {name for name in dir(db) if not name.startswith("_")}
    assert {"session", "engine", "unit_of_work", "on_commit", "task", "init_app"} <= shown
    assert not {"units", "runners", "lock", "start_worker", "after_fork", "pin"} & shown
    assert all(hasattr(type(db), name) or hasattr(db, name) for name in shown)
