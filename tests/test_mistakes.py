"""Mistakes in the definition of tasks are told: when a worker starts, or where they are made."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import pytest
from celery import Celery, Task
from sqlalchemy.orm import Session
from support import preloaded
from support.servers import RedisURLs
from support.waiting import eventually
from support.worker import Site

from celery_alchemy import Alchemy, ConfigurationError, CurrentSession, DatabaseTask, NoUnitOfWork, UseDatabase
from celery_alchemy.workers.attributes import NAMES
from celery_alchemy.workers.task import BaseDatabaseTask


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.alchemy_database_url = f"sqlite:///{tmp_path}/shop.db"
    app.conf.worker_hijack_root_logger = app.conf.worker_redirect_stdouts = False
    db = Alchemy(app)
    yield app
    db.stop()


def start(app: Celery) -> None:
    """Let a worker of `app` take its first steps, in this process: those in which it looks at its tasks."""
    worker = app.WorkController(pool_cls="solo")
    worker.stop()


class Other(Task):  # type: ignore[misc]
    """A base class of the user's, which is no DatabaseTask."""

    abstract = True


def plain(app: Celery) -> None:
    @app.task(name="wrong", shared=False)
    def wrong(name: str, session: CurrentSession) -> None: ...


def another_base(app: Celery) -> None:
    @app.task(name="wrong", shared=False, base=Other, bind=True)
    def wrong(self: Any, name: str, session: CurrentSession) -> None: ...


def pydantic(app: Celery) -> None:
    @app.task(name="wrong", shared=False, pydantic=True)
    def wrong(name: str, session: CurrentSession) -> None: ...


def another_database(app: Celery) -> None:
    @app.task(name="wrong", shared=False)
    def wrong(name: str, *, session: Annotated[Session, UseDatabase("reports")]) -> None: ...


def optional(app: Celery) -> None:
    @app.task(name="wrong", shared=False)
    def wrong(name: str, session: CurrentSession | None = None) -> None: ...


def old_optional(app: Celery) -> None:
    @app.task(name="wrong", shared=False)
    def wrong(name: str, session: Optional[CurrentSession] = None) -> None: ...  # noqa: UP045


def in_a_string(app: Celery) -> None:
    @app.task(name="wrong", shared=False)
    def wrong(name: str, session: "CurrentSession") -> None: ...


def class_based(app: Celery) -> None:
    class Wrong(Other):
        name = "wrong"

        def run(self, name: str, session: CurrentSession) -> None: ...

    app.register_task(Wrong())


@pytest.mark.parametrize(
    "define", [plain, another_base, pydantic, another_database, optional, old_optional, in_a_string, class_based]
)
def test_a_session_without_a_base_stops_the_worker(app: Celery, define: Callable[[Celery], None]) -> None:
    define(app)
    with pytest.raises(ConfigurationError, match=r"wrong .*'session'.*base=DatabaseTask"):
        start(app)


def test_an_attribute_of_ours_without_a_base_stops_the_worker(app: Celery) -> None:
    @app.task(name="wrong", shared=False, read_only=True)
    def wrong() -> None: ...

    with pytest.raises(ConfigurationError, match=r"wrong .*'read_only'.*base=DatabaseTask"):
        start(app)


def test_right_tasks_do_not_stop_the_worker(app: Celery) -> None:
    """Attributes of the user's own bases, and parameters that receive no Session of ours."""

    class Reading(Task):  # type: ignore[misc]
        abstract = True
        read_only = readonly = False

    @app.task(base=Reading, read_only=True, readonly=True, shared=False)
    def own(name: str, session: Session | None = None) -> None: ...

    @app.task(enqueue_on_commit=True, shared=False)
    def sent_later() -> None: ...

    @app.task(base=DatabaseTask, isolation_retries=2, shared=False)
    def ours(name: str, session: CurrentSession) -> None: ...

    start(app)


def test_attributes_for_all_tasks_do_not_stop_the_worker(app: Celery) -> None:
    app.conf.task_annotations = {"*": {"commit_on_success": True}}
    app.task(name="plain", shared=False)(start)
    start(app)


MISSPELLED = {
    "readonly": "read_only",
    "read_olny": "read_only",
    "readOnly": "read_only",
    "commit_on_sucess": "commit_on_success",
    "commits_on_success": "commit_on_success",
    "isolation_retry": "isolation_retries",
    "enqueue_on_comit": "enqueue_on_commit",
}


@pytest.mark.parametrize("name", MISSPELLED)
@pytest.mark.parametrize("where", ["decorator", "class", "base", "task_annotations"])
def test_a_misspelled_attribute_is_named(app: Celery, name: str, where: str) -> None:
    def wrong() -> None: ...

    def define() -> None:
        if where == "class":
            type("Wrong", (DatabaseTask,), {"name": "wrong", name: True, "run": lambda self: None})
        elif where == "base":
            type("Wrong", (DatabaseTask,), {"abstract": True, name: True, "name": "wrong"})
        else:
            if where == "task_annotations":
                app.conf.task_annotations = {"wrong": {name: True}}
            options = {name: True} if where == "decorator" else {}
            app.task(name="wrong", base=DatabaseTask, shared=False, **options)(wrong)
            start(app)

    with pytest.raises(ConfigurationError, match=f"{name}=True of 'wrong' .* '{MISSPELLED[name]}'"):
        define()


def test_what_only_looks_like_an_attribute_of_ours_is_let_be() -> None:
    class Mixin:
        readonly = False

    class Own(Mixin, DatabaseTask):
        readonly = True
        isolation_level = "SERIALIZABLE"
        read_only_fields = ("name",)
        success = commit = True

        def read_onlies(self) -> None: ...

    assert Own.readonly


def test_the_names_are_those_of_the_class() -> None:
    values = {
        name for name, value in vars(BaseDatabaseTask).items() if not name.startswith("_") and not callable(value)
    }
    assert values - {"abstract", "is_async", "on_bound", "refuse_function"} == set(NAMES)


def test_an_optional_session_is_passed(app: Celery) -> None:
    @app.task(base=DatabaseTask, shared=False)
    def is_there(session: CurrentSession | None = None) -> bool:
        return session is not None

    assert is_there.apply(throw=True).result


def test_an_annotation_that_only_type_checkers_can_read_is_refused(app: Celery) -> None:
    """From `if TYPE_CHECKING: from celery_alchemy import CurrentSession`: the parameter would never be filled."""
    module: dict[str, Any] = {"__name__": "shop"}
    source = """
        from __future__ import annotations
        def count(name: Unknown, session: celery_alchemy.CurrentSession) -> None: ...
        def other(name: Unknown) -> None: ...
    """
    exec(textwrap.dedent(source), module)
    with pytest.raises(ConfigurationError, match=r"CurrentSession.*'session' of count.*Import"):
        _ = app.task(base=DatabaseTask, shared=False)(module["count"]).name
    assert app.task(base=DatabaseTask, shared=False)(module["other"]).name == "shop.other"


# -- where there is no unit of work ----------------------------------------------------------------------------------


def test_a_session_outside_everything_says_what_to_write(app: Celery) -> None:
    """In a script, a shell, a web request; in a thread of a task."""
    db = app._celery_alchemy
    for use in (db.session.connection, db.session):
        with pytest.raises(NoUnitOfWork, match=r"script, a shell or a web request, write `with db.*In a thread"):
            use()


def test_a_session_in_a_plain_task_is_told_of_its_base(app: Celery) -> None:
    db = app._celery_alchemy

    @app.task(name="plain", shared=False)
    def plain() -> None:
        db.session.connection()

    @app.task(name="other", base=DatabaseTask, bind=True, shared=False)
    def other(self: DatabaseTask) -> None:
        assert self.db

    @app.task(name="around", shared=False)
    def around() -> None:
        other.db.connection()

    for task in (plain, around):
        with pytest.raises(NoUnitOfWork, match=f"the task {task.name}, which is no DatabaseTask.*base=DatabaseTask"):
            task.apply(throw=True)


# -- what only a DatabaseTask has ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [Task, Other], ids=["plain", "another base"])
@pytest.mark.parametrize("name", ["db", "session_for", "delay_on_commit", "apply_async_on_commit"])
def test_the_failure_of_a_task_without_a_base_is_explained(
    app: Celery, name: str, base: type, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task(name="forgotten", bind=True, base=base, shared=False)
    def forgotten(self: Any) -> None:
        getattr(self, name)

    assert forgotten.apply().failed()
    (said,) = [one.getMessage() for one in caplog.records if "no DatabaseTask" in one.getMessage()]
    assert said.startswith(f"The task forgotten is no DatabaseTask, so it has no {name!r}. Give it a base")


def test_the_failure_over_another_task_without_a_base_names_both(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    plain = app.task(name="plain", shared=False)(start)

    @app.task(name="sends", base=DatabaseTask, shared=False)
    def sends() -> None:
        plain.delay_on_commit()

    assert sends.apply().failed()
    assert "plain is no DatabaseTask, so it has no 'delay_on_commit', which the task sends has used" in caplog.text
    assert "db.delay_on_commit(task, ...)" in caplog.text


def test_other_failures_are_not_explained(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    """Not even where something else has no `db`, or another app has no Alchemy."""
    other = Celery("other", broker="memory://", set_as_current=False)

    class Thing:
        pass

    @app.task(base=DatabaseTask, bind=True, shared=False)
    def wrong_name(self: Any) -> None:
        self.dbs  # noqa: B018

    @app.task(shared=False)
    def wrong_thing() -> None:
        Thing().db  # type: ignore[attr-defined]  # noqa: B018

    @other.task(bind=True, shared=False)
    def not_ours(self: Any) -> None:
        self.db  # noqa: B018

    assert all(task.apply().failed() for task in (wrong_name, wrong_thing, not_ours))
    assert "DatabaseTask" not in caplog.text


# -- how it is said --------------------------------------------------------------------------------------------------

WRONG = """
import os
from celery import Celery
from celery_alchemy import Alchemy, DatabaseTask
app = Celery("wrong", broker=os.environ["BROKER"])
db = Alchemy(app)
@app.task(base=DatabaseTask)
def create(): pass
"""
SAID = "No database: set app.conf.alchemy_database_url"


def run(urls: RedisURLs, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "wrong.py").write_text(WRONG)
    environment = {**os.environ, "BROKER": urls.celery, "PYTHONPATH": str(folder), "C_FORCE_ROOT": "1"}
    command = [sys.executable, "-m", "celery", *arguments]
    return preloaded.run(command, cwd=folder, env=environment, timeout=250)


def test_a_worker_with_a_log_file_says_it_there_and_on_the_terminal(site: Site, tmp_path: Path) -> None:
    done = run(site.urls, tmp_path, "-A", "wrong", "worker", "-P", "solo", "-f", "worker.log")
    log = (tmp_path / "worker.log").read_text()
    assert done.returncode == 1
    assert done.stderr.count(SAID) == log.count(SAID) == 1
    assert "Traceback" not in done.stderr + log


def test_celery_multi_says_it_in_the_log(site: Site, tmp_path: Path) -> None:
    log = tmp_path / "w1.log"
    files = (f"--logfile={log}", "--pidfile=w1.pid")
    run(site.urls, tmp_path, "multi", "start", "w1", "-A", "wrong", "-P", "solo", *files)
    eventually(lambda: log.exists() and SAID in log.read_text(), "the detached worker has said it")
    assert log.read_text().count(SAID) == 1
    assert "Traceback" not in log.read_text()


@pytest.mark.filterwarnings("ignore::celery.exceptions.SecurityWarning")  # the user is root
def test_a_program_that_starts_a_worker_catches_it(app: Celery) -> None:
    app.conf.alchemy_session_strategy = "scopd"
    with pytest.raises(ConfigurationError, match="'scopd'") as caught:
        start(app)
    assert str(caught.value).startswith("alchemy_session_strategy")
    with pytest.raises(ConfigurationError, match="'scopd'"):
        app.worker_main(["worker", "-P", "solo"])
