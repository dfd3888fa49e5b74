"""A server that takes no writes for a while, in a failover: the error passes, and no connection to it is kept.

A task that was to read only, and writes, is a mistake, whatever the server says.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import exc, make_url, text
from support import databases, forking, servers
from support.apps import make_app
from support.databases import PostgreSQL
from support.worker import Start

from celery_alchemy import Alchemy, BrokenTransaction, TransientDatabaseError, WorkerPool, is_transient
from celery_alchemy.loadtests.services.rundir import run_directory
from celery_alchemy.loadtests.services.servers import PostgreSQLServer

WRITE = "INSERT INTO rows_ (key_, note) VALUES ('key', '')"
ASKED: list[dict[str, Any]] = [{"read_only": True}, {"read_only": "transaction"}]
POSTGRESQL = ("psycopg", "psycopg2")
MARIADB = ("pymysql", "mysqldb")


@contextmanager
def worker_of(url: str, **engine_options: Any) -> Iterator[Alchemy]:
    """Let an Alchemy be in force as in a worker."""
    _, db = make_app(url, changes={"alchemy_engine_options": engine_options})
    db.start_worker(WorkerPool(name="threads", concurrency=3))
    try:
        yield db
    finally:
        db.stop()


def error_of(db: Alchemy, *statements: str, **options: Any) -> exc.DBAPIError | None:
    found = None
    try:
        with db.unit_of_work(**options) as session:
            for statement in statements:
                session.execute(text(statement))
    except exc.DBAPIError as error:
        found = error
    assert isinstance(found, TransientDatabaseError) == is_transient(found)
    return found


def use_connections(db: Alchemy, count: int) -> None:
    """Have so many connections made, and give them back."""
    barrier = threading.Barrier(count)

    def use() -> None:
        with db.unit_of_work() as session:
            session.execute(text("SELECT 1"))
            barrier.wait(60)

    threads = [threading.Thread(target=use) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture(scope="module")
def apart(postgresql_server: Any, run_name: str) -> Iterator[PostgreSQL]:
    with databases.new_postgresql(postgresql_server, f"{run_name}_ro") as database:
        yield database


@pytest.fixture
def switch(apart: PostgreSQL) -> Iterator[Callable[[bool], None]]:
    """Let the server begin read-only transactions on each new connection to the database, or no longer."""

    def switch(read_only: bool) -> None:
        how = "SET default_transaction_read_only = on" if read_only else "RESET default_transaction_read_only"
        apart.execute(f"ALTER DATABASE {apart.engine.url.database} {how}")

    yield switch
    switch(False)


@pytest.mark.parametrize("driver", POSTGRESQL)
def test_a_server_that_takes_no_writes(apart: PostgreSQL, switch: Callable[[bool], None], driver: str) -> None:
    """All connections are thrown away with the one that met it: the next task is served by a new one."""
    with worker_of(apart.url("ro", driver=driver)) as db:
        switch(True)
        use_connections(db, 3)
        error = error_of(db, WRITE)
        assert is_transient(error)
        assert isinstance(error, exc.InternalError)
        assert "read-only transaction" in str(error)
        switch(False)
        assert [error_of(db, WRITE) for _ in range(4)] == [None] * 4


@pytest.mark.parametrize("driver", POSTGRESQL)
def test_a_task_that_swallows_it(apart: PostgreSQL, switch: Callable[[bool], None], driver: str) -> None:
    with worker_of(apart.url("ro", driver=driver)) as db:
        switch(True)
        for goes_on in (False, True):
            with pytest.raises((BrokenTransaction, exc.InternalError)) as raised, db.unit_of_work() as session:
                with pytest.raises(exc.InternalError):
                    session.execute(text(WRITE))
                if goes_on:
                    session.execute(text("SELECT 1"))  # refused, for the transaction has failed
            assert isinstance(raised.value, TransientDatabaseError)
        switch(False)
        assert error_of(db, WRITE) is None


@pytest.mark.parametrize("driver", POSTGRESQL)
@pytest.mark.parametrize("server", ["writes", "read-only"])
def test_a_task_that_was_to_read(apart: PostgreSQL, switch: Callable[[bool], None], driver: str, server: str) -> None:
    """Its mistake is no failover, and drops no connection."""
    with worker_of(apart.url("ro", driver=driver)) as db:
        switch(server == "read-only")
        use_connections(db, 3)
        before = {one.pid for one in apart.connections("ro")}
        for asked in ASKED:
            error = error_of(db, WRITE, **asked)
            assert error is not None
            assert not is_transient(error)
        if server == "writes":
            error = error_of(db, "SET TRANSACTION READ ONLY", WRITE)
            assert error is not None
            assert not is_transient(error), "the task's own code has asked for it"
        assert before <= {one.pid for one in apart.connections("ro")}


@pytest.mark.parametrize("driver", POSTGRESQL)
@pytest.mark.parametrize("where", ["url", "connect_args", "execution_options"])
def test_an_engine_that_was_to_read(apart: PostgreSQL, driver: str, where: str) -> None:
    option = "-c default_transaction_read_only=on"
    url = make_url(apart.url("ro", driver=driver))
    engine_options: dict[str, Any] = {
        "url": {},
        "connect_args": {"connect_args": {"options": option}},
        "execution_options": {"execution_options": {"postgresql_readonly": True}},
    }[where]
    if where == "url":
        url = url.update_query_dict({"options": option})
    with worker_of(url.render_as_string(hide_password=False), **engine_options) as db:
        error = error_of(db, WRITE)
        assert error is not None
        assert not is_transient(error)


@pytest.fixture(scope="module")
def standby(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PostgreSQLServer, Path]]:
    """A server with a table, and the file that makes it a standby when it starts."""
    with run_directory() as run, PostgreSQLServer(run, "standby") as server:
        with worker_of(server.url.render_as_string(hide_password=False)) as db:
            assert error_of(db, "CREATE TABLE rows_ (key_ text, note text)") is None
        yield server, run.path / "standby" / "data" / "standby.signal"


@pytest.mark.parametrize("driver", POSTGRESQL)
def test_a_primary_that_comes_back_as_a_standby(standby: tuple[PostgreSQLServer, Path], driver: str) -> None:
    server, signal = standby
    url = server.url.set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
    with worker_of(url) as db:
        assert error_of(db, WRITE) is None
        server.stop()
        signal.touch()
        server.start()
        assert is_transient(error_of(db, WRITE))
        assert error_of(db, "SELECT 1", read_only="transaction") is None
        error = error_of(db, WRITE, read_only="transaction")
        assert error is not None
        assert not is_transient(error)
        # SQLAlchemy lets this connection say BEGIN READ WRITE from now on, which a standby refuses.
        assert is_transient(error_of(db, WRITE))
        assert error_of(db, "SELECT 1") is None
        assert error_of(db, "SELECT pg_promote()") is None
        assert error_of(db, WRITE) is None


@pytest.fixture(scope="module")
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_ro") as database:
        yield database


@pytest.mark.parametrize("driver", MARIADB)
def test_mariadb(mariadb: databases.MariaDB, driver: str) -> None:
    forking.require(driver)
    url = make_url(mariadb.url("")).set(drivername=f"mysql+{driver}")
    option = "The MariaDB server is running with the --{} option so it cannot execute this statement"
    signal = "SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {}, MESSAGE_TEXT = '{}'"
    begins = {"init_command": "SET SESSION TRANSACTION READ ONLY"}
    with worker_of(url.render_as_string(hide_password=False)) as db:
        # The server itself would be read-only for the tests of others, too.
        assert is_transient(error_of(db, signal.format(1290, option.format("read-only"))))
        assert is_transient(error_of(db, signal.format(1836, "Running in read-only mode")))
        for error in (
            error_of(db, signal.format(1290, option.format("secure-file-priv"))),
            error_of(db, "COMMIT", "START TRANSACTION READ ONLY", WRITE),
            *(error_of(db, WRITE, **asked) for asked in ASKED),
        ):
            assert error is not None
            assert not is_transient(error)
        assert error_of(db, WRITE) is None
    with worker_of(url.render_as_string(hide_password=False), connect_args=begins) as db:
        assert is_transient(error_of(db, WRITE)), "as with transaction_read_only of the server"
        for asked in ASKED:
            error = error_of(db, WRITE, **asked)
            assert error is not None
            assert not is_transient(error)


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_in_a_worker(start: Start, apart: PostgreSQL, switch: Callable[[bool], None], pool: str, key: str) -> None:
    """Tasks with `autoretry_for` go through a failover; the others fail with an error that says that it passes."""
    with start(pool, url=apart.url("ro"), concurrency=2, modules=("endings", "transient")) as worker:
        switch(True)
        failed = worker.call_together("write_once", [(key, str(number), 0) for number in range(4)])
        assert {outcome.error for outcome in failed} == {"TransientInternalError"}
        ids = [worker.send("write_surely", key, str(number), 0) for number in range(4)]
        switch(False)
        assert {worker.wait(task_id).state for task_id in ids} == {"SUCCESS"}
        assert sorted(apart.rows(key)) == ["0", "1", "2", "3"]
