"""`isolation_retries`: a body does not run again where something was, or may have been, committed meanwhile."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, insert, select, text
from sqlalchemy.orm import Session
from support.project.models import Row

from celery_alchemy import Alchemy, DatabaseTask, TransientDatabaseError

SERVERS = ("psycopg", "psycopg2", "pymysql", "mysqldb")
pytestmark = pytest.mark.parametrize("place", SERVERS, indirect=True)
CONFLICTS = {
    "postgresql": "DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40001'; END $$",
    "mysql": "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213",
}


class Body:
    """What a body does before it meets a conflict."""

    def __init__(self, db: Alchemy, other: Engine, key: str) -> None:
        self.db = db
        self.other = other
        self.row = insert(Row).values(key=key, note="")
        self.sql = f"INSERT INTO rows_ (key_, note) VALUES ('{key}', '')"

    def raw(self) -> Any:
        return self.db.session.connection().connection.driver_connection

    def in_a_unit(self) -> None:
        with self.db.unit_of_work() as session:
            session.execute(self.row)

    def nested(self) -> None:
        self.in_a_unit()

    def helper_thread(self) -> None:
        with ThreadPoolExecutor(1) as executor:
            executor.submit(self.in_a_unit).result()

    def helper_thread_by_connection(self) -> None:
        def work() -> None:
            with self.db.engine.begin() as connection:
                connection.execute(self.row)

        with ThreadPoolExecutor(1) as executor:
            executor.submit(work).result()

    def autocommit(self) -> None:
        with self.db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(self.row)

    def raw_connection(self) -> None:
        raw = self.db.engine.raw_connection()
        raw.cursor().execute(self.sql)
        raw.commit()
        raw.close()

    def raw_connection_by_text(self) -> None:
        raw = self.db.engine.raw_connection()
        cursor = raw.cursor()
        cursor.execute(self.sql)
        cursor.execute("COMMIT")
        raw.close()

    def other_engine(self) -> None:
        with self.other.begin() as connection:
            connection.execute(self.row)

    def other_session(self) -> None:
        with Session(self.other) as session, session.begin():
            session.execute(self.row)

    def own_session(self) -> None:
        with Session(self.db.engine) as session, session.begin():
            session.execute(self.row)

    def by_text(self) -> None:
        self.db.session.execute(self.row)
        self.db.session.execute(text("COMMIT"))

    def by_text_and_on(self) -> None:
        self.db.session.execute(self.row)
        self.db.session.execute(text("COMMIT AND CHAIN"))

    def by_the_driver(self) -> None:
        self.db.session.execute(self.row)
        self.raw().commit()

    def by_the_connection(self) -> None:
        self.db.session.execute(self.row)
        self.db.session.connection().commit()

    def by_the_drivers_block(self) -> None:
        raw = self.raw()
        if hasattr(raw, "transaction"):
            with raw.transaction():
                raw.cursor().execute(self.sql)
        elif hasattr(raw, "set_session"):
            with raw:
                raw.cursor().execute(self.sql)
        else:
            self.by_the_driver()


class MariaDB(Body):
    """What commits there, beside COMMIT."""

    def start_transaction(self) -> None:
        self.db.session.execute(self.row)
        self.db.session.execute(text("START TRANSACTION"))

    def begin(self) -> None:
        self.db.session.execute(self.row)
        self.db.session.execute(text("BEGIN"))

    def set_autocommit(self) -> None:
        self.db.session.execute(self.row)
        self.db.session.execute(text("SET autocommit = 1"))
        self.db.session.execute(text("SET autocommit = 0"))

    def definition(self) -> None:
        self.db.session.execute(self.row)
        self.db.session.execute(text("CREATE TABLE IF NOT EXISTS again (i int)"))

    def lock(self) -> None:
        self.db.session.execute(self.row)
        self.db.session.execute(text("LOCK TABLES rows_ WRITE"))
        self.db.session.execute(text("UNLOCK TABLES"))


def names_of(kind: type) -> list[str]:
    return [name for name in vars(kind) if name not in {"__init__", "raw", "in_a_unit"} and not name.startswith("__")]


@pytest.fixture
def other(place: tuple[str, Any]) -> Any:
    engine = create_engine(place[0])
    yield engine
    engine.dispose()


@pytest.fixture
def body(db: Alchemy, other: Engine, key: str) -> Body:
    return MariaDB(db, other, key)


def run(db: Alchemy, work: Callable[[], object]) -> list[int]:
    """Run `work` in a task, and meet a conflict the first time; return one entry for each run."""
    runs: list[int] = []
    assert db.app is not None

    @db.app.task(base=DatabaseTask, bind=True, isolation_retries=2, shared=False)
    def task(self: Any) -> None:
        runs.append(1)
        work()
        if len(runs) == 1:
            self.db.execute(text(CONFLICTS.get(db.engine.dialect.name, CONFLICTS["mysql"])))

    task.apply().get()
    return runs


@pytest.mark.parametrize("name", [*names_of(Body), *names_of(MariaDB)])
def test_what_is_committed_meanwhile_is_committed_once(
    db: Alchemy, place: tuple[str, Any], key: str, body: Body, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    if name in vars(MariaDB) and db.engine.dialect.name == "postgresql":
        pytest.skip("these commit nothing there")
    with caplog.at_level(logging.WARNING), pytest.raises(TransientDatabaseError):
        run(db, getattr(body, name))
    assert len(place[1].rows(key)) == 1
    assert "does not run again" in caplog.text


def reads_in_a_unit(body: Body) -> None:
    with body.db.unit_of_work() as session:
        session.execute(select(Row.id)).first()


def reads_in_a_helper_thread(body: Body) -> None:
    with ThreadPoolExecutor(1) as executor:
        executor.submit(reads_in_a_unit, body).result()


def writes(body: Body) -> None:
    body.db.session.execute(body.row)


def writes_in_a_savepoint(body: Body) -> None:
    with body.db.session.begin_nested():
        body.db.session.execute(body.row)


def rolls_back_first(body: Body) -> None:
    body.db.session.execute(body.row)
    body.db.session.rollback()


@pytest.mark.parametrize(
    "work", [reads_in_a_unit, reads_in_a_helper_thread, writes, writes_in_a_savepoint, rolls_back_first]
)
def test_where_nothing_is_committed_it_runs_again(
    db: Alchemy, place: tuple[str, Any], key: str, body: Body, work: Callable[[Body], None]
) -> None:
    assert len(run(db, lambda: work(body))) == 2
    assert len(place[1].rows(key)) == (1 if work in {writes, writes_in_a_savepoint} else 0)
