"""Soft time limits while a driver waits inside C, where Python runs no signal handler: psycopg2 and mysqlclient."""

import contextlib
import itertools
import time
from collections.abc import Iterator

import pytest
from sqlalchemy import NullPool, create_engine, text
from support import databases, forking, green, servers
from support.worker import Site, Worker, running

DRIVERS = ("psycopg2", "mysqldb")
LIMIT_S = 1
on_postgresql = pytest.mark.parametrize("place", ["psycopg2"], indirect=True, scope="module")
TOO_LONG_S = 20
"""Every statement of these tasks takes longer."""
SLOW_COMMIT = (
    "CREATE TABLE slow_ (key_ text)",
    "CREATE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(2); RETURN NULL; END'",
    "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON slow_ DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
    "EXECUTE FUNCTION be_slow()",
)


@pytest.fixture(scope="module")
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_limits_in_c") as database:
        yield database


class Place:
    """A worker of prefork with one pool process, and its database."""

    def __init__(self, worker: Worker, database: databases.Database) -> None:
        self.worker, self.database = worker, database

    def strike(self, key: str, how: str = "sleep", **options: bool) -> str:
        """Let a task meet its limit while the server keeps it waiting; return how it ended."""
        began = time.monotonic()
        outcome = self.worker.call("wait_on_server", key, how, *options.values(), soft_time_limit=LIMIT_S)
        assert time.monotonic() - began < TOO_LONG_S, "the limit struck when the statement returned"
        databases.assert_not_busy(self.database, self.worker.name)
        assert [report["checkedout"] for report in self.worker.probe()] == [0]
        return outcome.error or outcome.value


@pytest.fixture(scope="module", params=DRIVERS)
def place(request: pytest.FixtureRequest, site: Site, run_name: str) -> Iterator[Place]:
    forking.require(request.param)
    database = request.getfixturevalue("mariadb" if request.param == "mysqldb" else "run_database")
    name = f"{site.prefix[:-1]}-limits-{request.param}"
    url = green.url_with(database, request.param, name)
    with running(Worker(site, name, "prefork", url, concurrency=1)) as worker:
        yield Place(worker, database)
    databases.assert_no_connections(database, name)


@pytest.mark.parametrize(
    ("place", "how"),
    [*itertools.product(DRIVERS, ("sleep", "lock", "nested")), ("psycopg2", "copy")],
    indirect=["place"],
    scope="module",
)
def test_the_limit_strikes_in_the_statement(place: Place, key: str, how: str) -> None:
    """The statement is stopped on the server, its connection thrown away, and the next task is none the worse."""
    postgresql = isinstance(place.database, databases.PostgreSQL)
    holder = create_engine(place.database.url("holder"), poolclass=NullPool)
    with holder.connect() as connection:
        if how == "lock":
            connection.execute(text("SELECT pg_advisory_lock(13)" if postgresql else "SELECT GET_LOCK('thirteen', 5)"))
        assert place.strike(key, how) == "SoftTimeLimitExceeded"
    assert place.database.rows(key) == []
    (stopped,) = place.worker.said(key)
    other = place.worker.call("tell_session_id", key)
    assert other.state == "SUCCESS", other
    if how != "nested":
        assert other.value != stopped
    assert place.database.rows(key) == ["next task"]


def test_a_task_that_catches_the_limit_goes_on(place: Place, key: str) -> None:
    assert place.strike(key, caught=True, how="sleep") == "caught"
    assert place.database.rows(key) == ["after the limit"]


def test_a_limit_makes_a_task_retry(place: Place, key: str) -> None:
    """`autoretry_for` sees the limit, not the driver's error about a statement that was stopped."""
    began = time.monotonic()
    outcome = place.worker.call("wait_once", key, soft_time_limit=LIMIT_S)
    assert outcome.value == "second attempt", outcome
    assert time.monotonic() - began < TOO_LONG_S
    assert place.database.rows(key) == ["attempt 1"]


@on_postgresql
def test_a_limit_does_not_stop_a_commit(place: Place, key: str) -> None:
    """The limit comes in the middle of it: the work is committed, and the task succeeds."""
    with contextlib.suppress(Exception):
        for statement in SLOW_COMMIT:
            place.database.execute(statement)
    outcome = place.worker.call("insert_with_slow_commit", key, soft_time_limit=LIMIT_S)
    assert outcome.state == "SUCCESS", outcome
    assert place.database.column("SELECT key_ FROM slow_ WHERE key_ = :key", key=key) == [key]


@on_postgresql
def test_copy_and_large_objects_go_on_working(place: Place, key: str) -> None:
    """With a wait callback of psycopg2's they would not."""
    outcome = place.worker.call("copy_and_large_object", key)
    assert outcome.value == ["copied\n", "large"], outcome
    assert place.database.rows(key) == ["copied"]
