"""A migration under running workers: what connections have prepared does not fit any more, and no task stays broken."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, exc, make_url, text
from support import green
from support.apps import Isolated, make_app
from support.databases import PostgreSQL
from support.pgbouncer import pgbouncer
from support.worker import Site, Worker, running

from celery_alchemy import Alchemy, TransientDatabaseError, WorkerPool, is_transient

TABLE = "CREATE TABLE changing (id int, note text)"
COLORS = "CREATE TYPE color AS ENUM ('red')"
COLORED = "CREATE TABLE changing (id int, color color)"
#: What was there, what tasks select, and what a migration does meanwhile.
CHANGES = {
    "another type": ([TABLE], "SELECT id FROM changing", ["ALTER TABLE changing ALTER id TYPE bigint"]),
    "a column more": ([TABLE], "SELECT * FROM changing", ["ALTER TABLE changing ADD more int"]),
    "a column less": ([TABLE], "SELECT * FROM changing", ["ALTER TABLE changing DROP note"]),
    "a type made anew": (
        [COLORS, COLORED],
        "SELECT id FROM changing WHERE color = :color",
        ["DROP TABLE changing", "DROP TYPE color", COLORS, COLORED],
    ),
    "a search path": (
        ["CREATE SCHEMA elsewhere", TABLE, "CREATE TABLE elsewhere.changing (id text)"],
        "SELECT id FROM changing",
        ["ALTER TABLE changing RENAME TO unchanging", "CREATE VIEW changing AS SELECT id FROM elsewhere.changing"],
    ),
}
NO_FEATURE = "SELECT count(*) FROM pg_class FOR UPDATE"
FORGET = text("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$")
ENOUGH = 7
"""Executions after which psycopg has prepared a statement."""
OURS = "stale"


@pytest.fixture
def changing(run_database: PostgreSQL) -> Iterator[PostgreSQL]:
    def clear() -> None:
        run_database.execute("DROP VIEW IF EXISTS changing") if is_view() else None
        run_database.execute("DROP TABLE IF EXISTS changing, unchanging CASCADE")
        run_database.execute("DROP TYPE IF EXISTS color CASCADE")
        run_database.execute("DROP SCHEMA IF EXISTS elsewhere CASCADE")

    def is_view() -> bool:
        return run_database.column("SELECT 1 FROM pg_views WHERE viewname = 'changing'") == [1]

    clear()
    yield run_database
    clear()


def alchemy(url: str, **changes: Any) -> Alchemy:
    _, db = make_app(url, changes=changes)
    db.start_worker(WorkerPool(name="threads", concurrency=1))
    return db


def select(db: Alchemy, read_only: Any, statement: str) -> int:
    """Execute a statement in a unit of work; return the connection's backend."""
    with db.unit_of_work(read_only=read_only) as session:
        session.execute(text(statement), {"color": "red"} if ":color" in statement else {}).all()
        pid: int = session.connection().connection.dbapi_connection.info.backend_pid  # type: ignore[union-attr]
        return pid


@pytest.mark.parametrize("change", CHANGES)
def test_a_read_only_task_does_not_notice(changing: PostgreSQL, change: str) -> None:
    """The statement is executed again, as it is; the next task has another connection, and prepares again."""
    before, statement, migration = CHANGES[change]
    for ddl in before:
        changing.execute(ddl)
    db = alchemy(changing.url(OURS))
    pids = [select(db, True, statement) for _ in range(ENOUGH)]
    for ddl in migration:
        changing.execute(ddl)
    pids += [select(db, True, statement) for _ in range(ENOUGH)]
    assert len(set(pids[: ENOUGH + 1])) == 1
    assert len(set(pids[ENOUGH + 1 :])) == 1
    assert pids[-1] != pids[0], "the connection was replaced"
    db.stop()


@pytest.mark.parametrize("mode", [False, "transaction"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_transaction_fails_once_and_passes(changing: PostgreSQL, change: str, mode: Any) -> None:
    before, statement, migration = CHANGES[change]
    for ddl in before:
        changing.execute(ddl)
    db = alchemy(changing.url(OURS))
    first = [select(db, mode, statement) for _ in range(ENOUGH)][-1]
    for ddl in migration:
        changing.execute(ddl)
    with pytest.raises(exc.DBAPIError) as raised:
        select(db, mode, statement)
    assert isinstance(raised.value, TransientDatabaseError)
    assert is_transient(raised.value.orig)
    assert {select(db, mode, statement) for _ in range(ENOUGH)} != {first}, "the connection was replaced"
    db.stop()


def test_a_savepoint_around_it_goes_on(changing: PostgreSQL, key: str) -> None:
    """The connection is replaced only when it comes back: what was written before is not lost."""
    changing.execute(TABLE)
    db = alchemy(changing.url(OURS))
    for _ in range(ENOUGH):
        select(db, False, "SELECT id FROM changing")
    changing.execute("ALTER TABLE changing ALTER id TYPE bigint")
    with db.unit_of_work() as session:
        session.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, 'before')"), {"key": key})
        with pytest.raises(TransientDatabaseError), session.begin_nested():
            session.execute(text("SELECT id FROM changing"))
        session.execute(text("SELECT id FROM changing"))
    assert changing.rows(key) == ["before"]
    db.stop()


@pytest.mark.parametrize("read_only", [True, False])
def test_what_was_prepared_is_gone(changing: PostgreSQL, read_only: bool) -> None:
    """DEALLOCATE ALL, DISCARD ALL: psycopg notices it only where it has sent it itself."""
    db = alchemy(changing.url(OURS))
    for _ in range(ENOUGH):
        select(db, read_only, "SELECT 1")
    with db.unit_of_work(read_only=read_only) as session:
        session.execute(FORGET)
    with contextlib.nullcontext() if read_only else pytest.raises(TransientDatabaseError):
        select(db, read_only, "SELECT 1")
    for _ in range(ENOUGH):
        select(db, read_only, "SELECT 1")
    db.stop()


def test_the_users_own_engine(changing: PostgreSQL) -> None:
    """Its statements are not executed again, but its connection is replaced too."""
    changing.execute(TABLE)
    engine = create_engine(changing.url(OURS), pool_size=1, max_overflow=0)
    db = Alchemy(Isolated("own", broker="memory://", set_as_current=False), engine=engine)
    db.start_worker(WorkerPool(name="threads", concurrency=1))
    for _ in range(ENOUGH):
        select(db, True, "SELECT id FROM changing")
    changing.execute("ALTER TABLE changing ALTER id TYPE bigint")
    with pytest.raises(TransientDatabaseError):
        select(db, True, "SELECT id FROM changing")
    select(db, True, "SELECT id FROM changing")
    engine.dispose()


def test_psycopg2_executes_what_the_user_has_prepared(changing: PostgreSQL) -> None:
    changing.execute(TABLE)
    db = alchemy(changing.url(OURS, "psycopg2"))
    with db.unit_of_work() as session:
        session.execute(text("PREPARE mine AS SELECT * FROM changing"))
    changing.execute("ALTER TABLE changing ADD more int")
    with pytest.raises(TransientDatabaseError):
        select(db, False, "EXECUTE mine")
    with db.unit_of_work() as session:
        session.execute(text("PREPARE mine AS SELECT * FROM changing"))
        session.execute(text("EXECUTE mine"))
    db.stop()


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("statement", [NO_FEATURE, "EXECUTE nosuch", "DO $$ BEGIN RAISE SQLSTATE 'XX000'; END $$"])
def test_what_fails_on_every_connection_does_not_pass(
    changing: PostgreSQL, driver: str, statement: str, read_only: bool
) -> None:
    """The same codes, without anything stale: not transient, and the connection stays."""
    db = alchemy(green.url_with(changing, driver, OURS))
    first = [select(db, read_only, "SELECT 1") for _ in range(ENOUGH)][-1]
    with pytest.raises(exc.DBAPIError) as raised:
        select(db, read_only, statement)
    assert not isinstance(raised.value, TransientDatabaseError)
    assert not is_transient(raised.value)
    assert select(db, read_only, "SELECT 1") == first
    db.stop()


def test_a_pooler_that_the_app_does_not_know_of(
    run_database: PostgreSQL, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Another connection of the server has the statement already, or does not know it: transient, whichever."""
    server = make_url(run_database.url("unused")).difference_update_query(["application_name"])
    seen: list[exc.DBAPIError] = []
    with pgbouncer(server, tmp_path_factory.mktemp("stale")) as pooled:
        _, db = make_app(pooled.render_as_string(hide_password=False))
        for _ in range(4 * ENOUGH):
            with db.engine.connect() as one, db.engine.connect() as other:
                for connection in (one, other):
                    try:
                        connection.execute(text("SELECT 1")).all()
                        connection.commit()
                    except exc.DBAPIError as error:
                        seen.append(error)
                        with contextlib.suppress(exc.DBAPIError):
                            connection.rollback()
        db.stop()
    assert {error.orig.sqlstate for error in seen} & {"26000", "42P05"}  # type: ignore[union-attr]
    assert all(isinstance(error, TransientDatabaseError) for error in seen)


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_forty_tasks_after_a_migration(site: Site, changing: PostgreSQL, pool: str) -> None:
    changing.execute(TABLE)
    name = f"{site.prefix[:-1]}-stale-{pool}"
    with running(Worker(site, name, pool, changing.url(name), modules=("reading",))) as worker:
        for task in ("read_changing", "read_changing_in_transaction"):
            assert {outcome.state for outcome in worker.call_together(task, [()] * 40)} == {"SUCCESS"}
        changing.execute("ALTER TABLE changing ADD more int")
        changing.execute("ALTER TABLE changing ALTER id TYPE bigint")
        reads = worker.call_together("read_changing", [()] * 40)
        assert [outcome.state for outcome in reads] == ["SUCCESS"] * 40
        surely = worker.call_together("read_changing_in_transaction", [()] * 40)
        assert [outcome.state for outcome in surely] == ["SUCCESS"] * 40, "autoretry_for sees what passes"
