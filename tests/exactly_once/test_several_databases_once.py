"""exactly_once in a unit of work over several databases: the row is of the default one."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, event, select
from support import servers
from support.databases import Database, new_mariadb, new_postgresql
from support.exactly_once import TABLE, Once, new_id
from support.project.models import Row

from celery_alchemy import DatabaseTask
from celery_alchemy.loadtests.errors import ServiceError
from celery_alchemy.loadtests.services.rundir import run_directory
from celery_alchemy.loadtests.services.servers import PostgreSQLServer

MODES = ["first", "last"]


@pytest.fixture(scope="module", params=["mariadb", "postgresql"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Database, Database]]:
    """Two databases of a server that prepares transactions."""
    if request.param == "mariadb":
        with (
            new_mariadb(servers.mariadb(), f"once_{new_id()[:6]}") as here,
            new_mariadb(servers.mariadb(), f"once_{new_id()[:6]}") as there,
        ):
            yield here, there
        return
    try:
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(PostgreSQLServer(stack.enter_context(run_directory()))).url
            here, there = (stack.enter_context(new_postgresql(url, name)) for name in ("here", "there"))
            yield here, there
    except ServiceError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[False, True], ids=["one after another", "two-phase"])
def once(pair: tuple[Database, Database], request: pytest.FixtureRequest) -> Iterator[Once]:
    here, there = pair
    once = Once(here, alchemy_databases={"there": there.url("once")}, alchemy_two_phase=request.param)
    yield once
    once.close()


def is_two_phase(once: Once) -> bool:
    return bool(once.app.conf.alchemy_two_phase)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["here", "there", "both", "neither"])
def test_the_row_is_written_with_its_result(
    once: Once, pair: tuple[Database, Database], mode: Any, place: str, key: str
) -> None:
    """With alchemy_two_phase too, where a transaction that was begun to be prepared is not."""

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode)
    def work(self: Any) -> str:
        if place in {"here", "both"}:
            self.db.add(Row(key=key))
        if place in {"there", "both"}:
            self.session_for("there").add(Row(key=key))
        return "done"

    task_id = new_id()
    for _ in range(2):
        assert once.deliver(work, task_id=task_id) == ("SUCCESS", "done")
    assert once.at_once(work, task_id=new_id()) == [("SUCCESS", "done")] * 2
    assert [row[2] for row in once.recorded(task_id)] == ['"done"']
    due = [2 if place in {name, "both"} else 0 for name in ("here", "there")]
    assert [len(database.rows(key)) for database in pair] == due


@pytest.mark.parametrize("mode", MODES)
def test_work_elsewhere_is_not_committed_where_a_second_commit_is_refused(
    once: Once, pair: tuple[Database, Database], mode: Any, key: str
) -> None:
    @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode)
    def work(self: Any) -> None:
        self.db.add(Row(key=key, note="first"))
        self.db.commit()
        self.db.add(Row(key=key, note="second"))
        self.session_for("there").add(Row(key=key))

    state, error = once.deliver(work, task_id=new_id())
    assert (state, type(error).__name__) == ("FAILURE", "CommittedEarly")
    assert [database.rows(key) for database in pair] == [["first"], []]


@pytest.mark.parametrize("mode", MODES)
def test_a_session_that_begins_nothing_by_itself(
    once: Once, pair: tuple[Database, Database], mode: Any, key: str
) -> None:
    once.app.conf.alchemy_session_options = {"autobegin": False}

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode)
    def work(self: Any) -> str:
        there = self.session_for("there")
        there.begin()
        there.add(Row(key=key))
        return "done"

    task_id = new_id()
    for _ in range(2):
        assert once.deliver(work, task_id=task_id) == ("SUCCESS", "done")
    assert [len(database.rows(key)) for database in pair] == [0, 1]


@pytest.mark.parametrize("mode", MODES)
def test_a_session_that_is_bound_to_both(once: Once, pair: tuple[Database, Database], mode: Any, key: str) -> None:
    """The row goes where its table is, also where the other database is used first."""
    engine = create_engine(pair[1].url("bound"))
    once.app.conf.alchemy_session_options = {"binds": {Row: engine}}
    pair[1].execute(f"ALTER TABLE {TABLE} RENAME TO elsewhere")

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode)
    def work(self: Any) -> str:
        self.db.add(Row(key=key))
        self.db.flush()
        return "done"

    task_id = new_id()
    try:
        for _ in range(2):
            assert once.deliver(work, task_id=task_id) == ("SUCCESS", "done")
    finally:
        engine.dispose()
        pair[1].execute(f"ALTER TABLE elsewhere RENAME TO {TABLE}")
    assert len(once.recorded(task_id)) == 1
    assert [len(database.rows(key)) for database in pair] == [0, 1]


@pytest.mark.parametrize("mode", MODES)
def test_the_row_is_prepared_before_work_elsewhere_is_committed(
    once: Once, pair: tuple[Database, Database], mode: Any, key: str
) -> None:
    """Also where the task has not used the default database. A worker that is killed between two COMMITs leaves both
    to be committed, or none."""

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode)
    def work(self: Any) -> str:
        self.session_for("there").add(Row(key=key))
        return "done"

    said: list[str] = []
    for name, one in once.db.databases.items():
        event.listen(one.engine, "prepare_twophase", lambda *_, name=name: said.append(f"prepare {name}"))
        event.listen(one.engine, "commit_twophase", lambda *_, name=name: said.append(f"commit {name}"))
    once.deliver(work, task_id=new_id())
    prepares, commits = ([f"{word} {name}" for name in ("default", "there")] for word in ("prepare", "commit"))
    assert [sorted(said[:2]), sorted(said[2:])] == ([prepares, commits] if is_two_phase(once) else [[], []])


def test_it_is_forgotten_by_the_alchemy_of_any_database(once: Once, key: str) -> None:
    """The row is in the default one."""

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True)
    def work(self: Any) -> None:
        self.session_for("there").add(Row(key=key))

    task_id = new_id()
    once.deliver(work, task_id=task_id)
    assert once.db.databases["there"].forget(task_id) == 1
    assert once.recorded(task_id) == []


def test_a_message_of_the_flush_of_the_commit_is_written(once: Once, pair: tuple[Database, Database], key: str) -> None:
    """With alchemy_two_phase too, where the transaction of a single database is not prepared after all."""
    once.app.conf.alchemy_outbox = "relay"

    @once.app.task(base=DatabaseTask, bind=True)
    def work(self: Any) -> None:
        self.db.execute(select(1))
        self.db.add(Row(key=key))

    def send(*_: Any) -> None:
        work.apply_async_on_commit(task_id=task_id)

    task_id = new_id()
    event.listen(Row, "after_insert", send)
    try:
        assert once.deliver(work, task_id=new_id()) == ("SUCCESS", None)
    finally:
        event.remove(Row, "after_insert", send)
    assert len(pair[0].rows(key)) == 1
    assert pair[0].column("SELECT task_id FROM celery_alchemy_outbox") == [task_id]
    pair[0].execute("DELETE FROM celery_alchemy_outbox")
