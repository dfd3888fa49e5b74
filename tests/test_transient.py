"""Which errors of a database pass by themselves, as real servers and drivers report them."""

import contextlib
import pickle
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import exc, make_url, text
from support import databases, green, servers
from support.databases import PostgreSQL

from celery_alchemy import Alchemy, BrokenTransaction, TransientDatabaseError, WorkerPool, is_transient

RAISE = "DO $$ BEGIN RAISE EXCEPTION SQLSTATE '{}'; END $$"


def alchemy(url: str, **engine_options: Any) -> Alchemy:
    app = Celery("transient", broker="memory://", set_as_current=False)
    app.conf.update(alchemy_database_url=url, alchemy_engine_options=engine_options)
    db = Alchemy(app)
    db.start_worker(WorkerPool(name="threads", concurrency=2))
    return db


def error_of(db: Alchemy, *statements: str) -> Exception:
    """Run the statements in a unit of work, and return what it raises."""
    with pytest.raises(Exception) as raised, db.unit_of_work() as session:
        for statement in statements:
            session.execute(text(statement))
    db.stop()
    return raised.value


@pytest.fixture(params=["psycopg", "psycopg2"])
def url(request: pytest.FixtureRequest, run_database: PostgreSQL) -> str:
    return green.url_with(run_database, request.param, "transient")


@pytest.fixture(scope="module")
def mariadb_url(run_name: str) -> Iterator[str]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_transient") as database:
        yield database.url("")


@pytest.mark.parametrize("state", ["40001", "40P01", "55P03", "57P03", "08006", "53300"])
def test_states_that_pass(url: str, state: str) -> None:
    error = error_of(alchemy(url), RAISE.format(state))
    assert isinstance(error, TransientDatabaseError)
    assert isinstance(error, exc.DBAPIError)
    assert is_transient(error)
    assert is_transient(error.orig), "the driver's own error says it too"
    assert error.__cause__ is error.orig


@pytest.mark.parametrize("state", ["23505", "22012", "42601", "57014", "57P04", "28P01"])
def test_states_that_do_not(url: str, state: str) -> None:
    error = error_of(alchemy(url), RAISE.format(state))
    assert isinstance(error, exc.DBAPIError)
    assert not isinstance(error, TransientDatabaseError)
    assert not is_transient(error)
    assert not is_transient(error.orig)


def test_it_is_an_operational_error_as_before(url: str) -> None:
    error = error_of(alchemy(url), RAISE.format("40P01"))
    assert isinstance(error, exc.OperationalError)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))


def test_a_terminated_connection(url: str) -> None:
    error = error_of(alchemy(url), "SELECT pg_terminate_backend(pg_backend_pid())", "SELECT 1")
    assert isinstance(error, TransientDatabaseError)


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({"host": "127.0.0.1", "port": 1}, True),
        ({"host": None, "query": {"host": "/nowhere"}}, True),
        ({"database": "nosuch"}, False),
        ({"username": "nosuch"}, False),
    ],
    ids=["refused", "no socket", "no database", "no role"],
)
def test_connecting(run_database: PostgreSQL, url: str, change: dict[str, Any], passes: bool) -> None:
    there = make_url(url)
    if "host" in change:
        there = there.difference_update_query(["host"])
    error = error_of(alchemy(there.set(**change).render_as_string(hide_password=False)), "SELECT 1")
    assert isinstance(error, exc.OperationalError)
    assert (isinstance(error, TransientDatabaseError), is_transient(error.orig)) == (passes, passes)


def test_an_error_that_was_swallowed(url: str) -> None:
    db = alchemy(url)
    with (
        pytest.raises(BrokenTransaction) as raised,
        db.unit_of_work() as session,
        contextlib.suppress(exc.OperationalError),
    ):
        session.execute(text(RAISE.format("40001")))
    assert isinstance(raised.value, TransientDatabaseError)
    with (
        pytest.raises(BrokenTransaction) as raised,
        db.unit_of_work() as session,
        contextlib.suppress(exc.DBAPIError),
    ):
        session.execute(text(RAISE.format("22012")))
    assert not isinstance(raised.value, TransientDatabaseError)
    db.stop()


@pytest.mark.parametrize("number", [1205, 1213, 1020, 3572])
def test_numbers_that_pass(mariadb_url: str, number: int) -> None:
    error = error_of(alchemy(mariadb_url), f"SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = {number}")
    assert isinstance(error, TransientDatabaseError)
    assert is_transient(error.orig)  # type: ignore[attr-defined]


@pytest.mark.parametrize("statement", ["SELECT nosuch", "KILL QUERY CONNECTION_ID()"])
def test_numbers_that_do_not(mariadb_url: str, statement: str) -> None:
    assert not is_transient(error_of(alchemy(mariadb_url), statement))


def test_a_killed_mariadb_connection(mariadb_url: str) -> None:
    assert is_transient(error_of(alchemy(mariadb_url), "KILL CONNECTION_ID()", "SELECT 1"))


def test_a_locked_sqlite_file(tmp_path: Path) -> None:
    file = tmp_path / "locked.sqlite3"
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    error = error_of(alchemy(f"sqlite:///{file}", connect_args={"timeout": 0.05}), "CREATE TABLE t (a int)")
    other.close()
    assert isinstance(error, TransientDatabaseError)


def test_no_connection_free(run_database: PostgreSQL) -> None:
    db = alchemy(run_database.url("transient"), pool_size=1, max_overflow=0, pool_timeout=0.05)
    errors: list[BaseException] = []

    def want_one() -> None:
        try:
            db.engine.connect()
        except exc.TimeoutError as error:
            errors.append(error)

    with db.engine.connect():
        thread = threading.Thread(target=want_one)
        thread.start()
        thread.join()
    db.stop()
    assert [isinstance(error, TransientDatabaseError) for error in errors] == [True]


@pytest.mark.parametrize("error", [ValueError("timed out"), OSError(2006, "x"), KeyError(1213), None])
def test_what_is_no_database_error(error: BaseException | None) -> None:
    assert not is_transient(error)
