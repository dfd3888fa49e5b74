"""With BEGIN along with the first statement: two-phase commit, PgBouncer, interruptions."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import insert, make_url, text
from support import databases, green
from support.databases import PostgreSQL
from support.first_statement import AWAITED, SETTING, Started, start_worker
from support.pgbouncer import pgbouncer
from support.project.models import Row
from support.waiting import eventually
from support.worker import Site, Worker, running

from celery_alchemy.loadtests.errors import ServiceError
from celery_alchemy.loadtests.services.rundir import run_directory
from celery_alchemy.loadtests.services.servers import PostgreSQLServer

# -- two-phase commit, PgBouncer ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preparing() -> Iterator[PostgreSQL]:
    """A database of a server that prepares transactions."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(PostgreSQLServer(stack.enter_context(run_directory())))
        except ServiceError as error:
            pytest.skip(str(error))
        yield stack.enter_context(databases.new_postgresql(server.url, "prepares"))


def test_two_phase_commit(start: Started, preparing: PostgreSQL, driver: str, key: str) -> None:
    db = start(green.url_with(preparing, driver.removeprefix("await "), "two_phase"), True)
    with db.engine.connect() as connection:
        for ending in ("commit", "rollback", "commit"):
            transaction = connection.begin_twophase()
            connection.execute(insert(Row).values(key=key, note=ending))
            transaction.prepare()
            assert preparing.column("SELECT count(*) FROM pg_prepared_xacts") == [1]
            getattr(transaction, ending)()
            # and one that is not prepared, between
            connection.execute(insert(Row).values(key=key, note="rolled back"))
            connection.rollback()
    assert preparing.rows(key) == ["commit", "commit"]
    assert preparing.column("SELECT count(*) FROM pg_prepared_xacts") == [0]
    db.stop()


POOLS = {"prefork": 3, "threads": 4, "gevent": 8, "eventlet": 8, "solo": 1, "asyncio": 8}
NOT_AWAITED, AWAITED_ALONE = {"gevent", "eventlet"}, {"asyncio"}
SERVER_CONNECTIONS = 3


@pytest.fixture(scope="module")
def pooled(run_database: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    server = make_url(run_database.url("unused")).difference_update_query(["application_name"])
    with pgbouncer(server, tmp_path_factory.mktemp("pgbouncer"), pool_size=SERVER_CONNECTIONS) as address:
        yield address


@pytest.mark.parametrize("pool", POOLS)
def test_tasks_behind_pgbouncer(
    site: Site, pooled: Any, run_database: PostgreSQL, driver: str, key: str, pool: str
) -> None:
    """Transaction mode: each transaction is whole, on whatever connection of the server it finds."""
    awaits = driver == AWAITED
    if pool in (NOT_AWAITED if awaits else AWAITED_ALONE):
        pytest.skip("no such tasks run there")
    driver = driver.removeprefix("await ")
    address = pooled.set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
    worker = Worker(
        site,
        f"{site.prefix[:-1]}-first-{pool}-{driver}{'-awaits' * awaits}",
        pool,
        database_url=address,
        concurrency=POOLS[pool],
        awaits=awaits,
        modules=("endings", "pooled"),
        settings={"alchemy_external_pooler": "pgbouncer", "alchemy_application_name": True, SETTING: True},
    )
    with running(worker):
        assert "BEGIN goes with the first statement" in worker.log()
        notes = [str(number) for number in range(40)]
        outcomes = worker.call_together("write_through_pooler", [(key, note) for note in notes])
        assert {outcome.state for outcome in outcomes} == {"SUCCESS"}, outcomes
        assert sorted(run_database.rows(key)) == sorted(notes)
        read = worker.call_together("read_through_pooler", [(key,)] * 10)
        assert [outcome.value for outcome in read] == [[40, "on"]] * 10


# -- interruptions -----------------------------------------------------------------------------------------------------


class Interruption(BaseException):
    """What a signal handler raises."""


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise an Interruption in the main thread."""

    def strike(*_: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGALRM, strike)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first(session: Any, key: str) -> None:
    session.execute(text("SELECT pg_sleep(60)"))


def first_of_many(session: Any, key: str) -> None:
    session.execute(text("INSERT INTO rows_ (key_, note) SELECT :key, pg_sleep(60)::text"), [{"key": key}] * 3)


def second(session: Any, key: str) -> None:
    session.add(Row(key=key))
    session.flush()
    session.execute(text("SELECT pg_sleep(60)"))


@pytest.mark.parametrize("sleep", [first, first_of_many, second])
def test_an_interruption_in_the_middle_of_a_statement(
    run_database: PostgreSQL, key: str, sleep: Callable[[Any, str], None]
) -> None:
    """It is raised as it is, at once; the statement is cancelled, the connection closed, nothing is committed."""
    db = start_worker(green.url_with(run_database, "psycopg", "struck"), True)
    with db.engine.connect():
        pass
    for _ in range(2):
        with pytest.raises(Interruption), interrupted_after(0.3), db.unit_of_work() as session:
            sleep(session, key)
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        eventually(lambda: not run_database.busy("struck"), "the server is done")
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="after"))
    assert run_database.rows(key) == ["after"]
    db.stop()
