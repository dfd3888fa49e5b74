"""exactly_once beside what else a unit of work can be: over several databases, retried, of a Session of the user's,
stopped by a time limit, in a test's one transaction."""

from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker
from support import servers
from support.databases import MariaDB, PostgreSQL, new_mariadb
from support.exactly_once import Once, new_id
from support.project.models import Counter, Row

from celery_alchemy import Alchemy, DatabaseTask

MODES = ["first", "last"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("two_phase", [False, True])
def test_several_databases(run_database: PostgreSQL, there: PostgreSQL, mode: Any, two_phase: bool, key: str) -> None:
    if two_phase and run_database.column("SHOW max_prepared_transactions") == ["0"]:
        pytest.skip("the server prepares no transactions")
    once = Once(run_database, alchemy_databases={"there": there.url("once")}, alchemy_two_phase=two_phase)

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode)
    def work(self: Any) -> str:
        self.session_for("there").add(Row(key=key))
        self.db.add(Row(key=key))
        return "done"

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode)
    def only_there(self: Any) -> str:
        self.session_for("there").add(Row(key=key))
        return "done"

    try:
        for number, task in enumerate((work, work, only_there), 1):
            task_id = new_id()
            for _ in range(2):
                assert once.deliver(task, task_id=task_id) == ("SUCCESS", "done")
            assert len(there.rows(key)) == number
            assert len(once.recorded(task_id)) == 1
        assert len(run_database.rows(key)) == 2
    finally:
        once.close()


@pytest.mark.parametrize("mode", MODES)
def test_two_phases_on_mariadb(mariadb: MariaDB, mode: Any, key: str) -> None:
    with new_mariadb(servers.mariadb(), f"once_{new_id()[:6]}") as other:
        once = Once(mariadb, alchemy_databases={"there": other.url("once")}, alchemy_two_phase=True)

        @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode)
        def work(self: Any) -> str:
            self.session_for("there").add(Row(key=key))
            self.db.add(Row(key=key))
            return "done"

        try:
            task_id = new_id()
            for _ in range(2):
                assert once.deliver(work, task_id=task_id) == ("SUCCESS", "done")
            assert len(other.rows(key)) == len(mariadb.rows(key)) == 1
            assert once.at_once(work, task_id=new_id()) == [("SUCCESS", "done")] * 2
            assert len(other.rows(key)) == len(mariadb.rows(key)) == 2
        finally:
            once.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_conflict_runs_the_body_again(once: Once, mode: Any, key: str) -> None:
    once.database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=key)
    runs = []

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode, isolation_retries=30)
    def count(self: Any) -> int:
        runs.append(1)
        counter = self.db.scalars(select(Counter).where(Counter.key == key).with_for_update()).one()
        counter.value += 1
        if len(runs) < 3:
            self.db.flush()
            raise conflict(self.db)
        return counter.value

    assert once.deliver(count, task_id=new_id()) == ("SUCCESS", 1)
    assert len(runs) == 3


def conflict(session: Session) -> BaseException:
    """Return an error as the server raises it for a transaction that has lost against another one."""
    from sqlalchemy.exc import OperationalError

    mysql = session.get_bind().dialect.name in {"mysql", "mariadb"}
    original: Any = type("OperationalError", (Exception,), {})(*((1213, "Deadlock") if mysql else ("lost",)))
    original.sqlstate = "40001"
    return OperationalError("UPDATE", {}, original)


@pytest.mark.parametrize("mode", MODES)
def test_a_session_factory_of_the_users(run_database: PostgreSQL, mode: Any, key: str) -> None:
    class Own(Session):
        pass

    def made(**options: Any) -> Session:
        return Own(**options)

    once = Once(run_database)
    for factory in (sessionmaker(class_=Own), Own, made):
        once.app.__dict__.pop("_celery_alchemy", None)
        once.app.__dict__.pop("_celery_alchemy_databases", None)
        db = Alchemy(once.app, session_factory=factory)

        @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode, name=f"work{id(factory)}")
        def work(self: Any) -> bool:
            self.db.add(Row(key=key))
            return isinstance(self.db, Own)

        task_id = new_id()
        for _ in range(2):
            assert once.deliver(work, task_id=task_id) == ("SUCCESS", True)
        db.stop()
    assert len(run_database.rows(key)) == 3
    once.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_time_limit_is_a_failure_and_nothing_is_recorded(once: Once, mode: Any, key: str) -> None:
    @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode)
    def work(self: Any) -> None:
        self.db.add(Row(key=key))
        self.db.flush()
        raise SoftTimeLimitExceeded

    task_id = new_id()
    assert once.deliver(work, task_id=task_id)[0] == "FAILURE"
    assert once.recorded(task_id) == []
    assert once.database.rows(key) == []


@pytest.mark.parametrize("mode", MODES)
def test_in_one_transaction_of_a_test(run_database: PostgreSQL, mode: Any, key: str) -> None:
    once = Once(run_database)

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode)
    def work(self: Any) -> str:
        self.db.add(Row(key=key))
        self.db.commit()
        return "done"

    try:
        with once.db.one_transaction() as session:
            task_id = new_id()
            assert once.deliver(work, task_id=task_id) == ("SUCCESS", "done")
            assert len(session.scalars(select(Row).where(Row.key == key)).all()) == 1
        assert run_database.rows(key) == []
    finally:
        once.close()


@pytest.mark.parametrize("mode", MODES)
def test_each_way_to_commit(once: Once, mode: Any, key: str) -> None:
    def by_session(session: Session) -> None:
        session.commit()

    def by_block(session: Session) -> None:
        with session.begin_nested():
            session.add(Row(key=key, note="nested"))
        session.get_transaction().commit()  # type: ignore[union-attr]

    def by_connection(session: Session) -> None:
        session.flush()
        session.connection().commit()

    for commit in (by_session, by_block, by_connection):

        @once.app.task(base=DatabaseTask, bind=True, exactly_once=mode, name=f"{commit.__name__}-{mode}")
        def work(self: Any) -> str:
            self.db.add(Row(key=key, note=commit.__name__))  # noqa: B023
            commit(self.db)  # noqa: B023
            raise SystemExit  # as if its process were killed now

        task_id = new_id()
        with pytest.raises(SystemExit):
            once.deliver(work, task_id=task_id)
        assert len(once.recorded(task_id)) == 1, commit.__name__
        assert once.database.rows(key).count(commit.__name__) == 1


def test_the_tasks_own_error_stays_its_own(once: Once, key: str) -> None:
    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True)
    def work(self: Any) -> None:
        self.db.execute(update(Counter).values(value=1))
        self.db.execute(text("INSERT INTO users (id, name) VALUES (1, 'x')"))
        self.db.execute(text("INSERT INTO users (id, name) VALUES (1, 'x')"))

    task_id = new_id()
    state, error = once.deliver(work, task_id=task_id)
    assert state == "FAILURE"
    assert isinstance(error, IntegrityError)
    assert once.recorded(task_id) == []
