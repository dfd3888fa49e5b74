"""Tasks that only read: one round trip for a SELECT, no write gets through, and what needs a transaction says so."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import event, make_url, select, text
from sqlalchemy.exc import DBAPIError
from support import databases, green, servers
from support.apps import make_app
from support.databases import Database, PostgreSQL
from support.project.models import Counter, Row
from support.waiting import eventually
from support.worker import Site, Worker, running

from celery_alchemy import Alchemy, CeleryAlchemyError, ConfigurationError, DatabaseTask, WorkerPool
from celery_alchemy.loadtests.services.proxy import CountingProxy

DRIVERS = ("psycopg", "psycopg2", "pymysql")
ALL = pytest.mark.parametrize("driver", DRIVERS)


@pytest.fixture(scope="module")
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_read_only") as database:
        yield database


@pytest.fixture
def database(request: pytest.FixtureRequest, driver: str) -> Database:
    found: Database = request.getfixturevalue("mariadb" if driver == "pymysql" else "run_database")
    return found


Started = Callable[..., tuple[Celery, Alchemy]]


@pytest.fixture
def started(database: Database, driver: str) -> Iterator[Started]:
    """Make an app whose strategy is that of a worker."""
    with contextlib.ExitStack() as stack:

        def start(strategy: str = "auto", pool: str = "threads", url: str = "") -> tuple[Celery, Alchemy]:
            app, db = make_app(url or green.url_with(database, driver, "read_only"))
            app.conf.alchemy_session_strategy = strategy
            db.start_worker(WorkerPool(name=pool, concurrency=2))
            stack.callback(db.stop)
            return app, db

        yield start


@pytest.fixture
def proxied(database: Database, driver: str) -> Iterator[CountingProxy]:
    with CountingProxy(make_url(green.url_with(database, driver, "read_only"))) as proxy:
        yield proxy


@ALL
@pytest.mark.parametrize("strategy", ["local", "scoped", "per_process"])
def test_one_select_is_one_round_trip(started: Started, proxied: CountingProxy, driver: str, strategy: str) -> None:
    app, _ = started(strategy, url=proxied.url.render_as_string(hide_password=False))
    costs = {}
    for mode in (True, "transaction", False):

        @app.task(base=DatabaseTask, bind=True, read_only=mode, name=f"read {mode}")
        def read(self: Any) -> Any:
            return self.db.execute(text("SELECT 1")).scalar_one()

        read.apply().get()
        before = proxied.round_trips
        assert read.apply().get() == 1
        costs[mode] = proxied.round_trips - before
    assert costs[True] == 1
    assert costs[False] == (2 if driver == "pymysql" else 3)
    assert costs["transaction"] == 3


@ALL
@pytest.mark.parametrize("mode", [True, "transaction"])
@pytest.mark.parametrize("how", ["text", "core", "orm", "change", "delete"])
def test_no_write_gets_through(started: Started, database: Database, key: str, mode: Any, how: str) -> None:
    app, _ = started()
    database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=key)

    @app.task(base=DatabaseTask, bind=True, read_only=mode)
    def write(self: Any) -> None:
        if how == "text":
            self.db.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, '')"), {"key": key})
        elif how == "core":
            self.db.execute(Row.__table__.insert().values(key_=key, note=""))
        elif how == "orm":
            self.db.add(Row(key=key))
        elif how == "change":
            self.db.get(Counter, key).value = 7
        else:
            self.db.delete(self.db.get(Counter, key))

    with pytest.raises((DBAPIError, CeleryAlchemyError)) as raised:
        write.apply().get()
    if how in {"orm", "change", "delete"}:
        assert "is read-only, but would write" in str(raised.value)
    assert database.rows(key) == []
    assert database.column("SELECT value FROM counters WHERE key_ = :key", key=key) == [0]


@pytest.mark.parametrize("driver", ["psycopg"])
def test_what_needs_a_transaction_says_so(started: Started, key: str) -> None:
    app, _ = started()
    statements = {
        "FOR UPDATE": select(Row).with_for_update(),
        "yield_per": select(Row).execution_options(yield_per=10),
        "stream_results": select(Row).execution_options(stream_results=True),
    }

    @app.task(base=DatabaseTask, bind=True, read_only=True)
    def read(self: Any, name: str) -> None:
        self.db.execute(statements[name]).all()

    for name in statements:
        with pytest.raises(CeleryAlchemyError, match="read_only='transaction'"):
            read.apply([name]).get()

    @app.task(base=DatabaseTask, bind=True, read_only="transaction")
    def stream(self: Any) -> int:
        return len(self.db.execute(statements["yield_per"]).all())

    assert stream.apply().get() >= 0


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_what_a_statement_sees(started: Started, database: Database, key: str) -> None:
    """Without a transaction whatever is committed by now; within one, always the same (REPEATABLE READ)."""
    _app, db = started()

    def read_twice(session: Any) -> list[int]:
        count = text("SELECT count(*) FROM rows_ WHERE key_ = :key")
        first = session.scalar(count, {"key": key})
        with db.unit_of_work() as other:
            other.add(Row(key=key))
        return [first, session.scalar(count, {"key": key})]

    with db.unit_of_work(read_only=True) as session:
        assert read_twice(session) == [0, 1]
    with db.unit_of_work(read_only="transaction") as session:
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        assert read_twice(session) == [1, 1]


@pytest.mark.parametrize("driver", ["psycopg"])
def test_it_leaves_the_ordinary_connections_alone(started: Started, database: Database, key: str) -> None:
    _, db = started()
    for _ in range(3):
        for mode in (True, "transaction"):
            with db.unit_of_work(read_only=mode) as session:
                session.execute(text("SELECT 1"))
        with db.unit_of_work() as session:
            session.add(Row(key=key))
    assert len(database.rows(key)) == 3
    assert db.strategy.read_engine is not db.engine
    assert db.strategy.read_engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("driver", ["psycopg"])
def test_modes_do_not_mix_in_a_call(started: Started) -> None:
    app, db = started()

    @app.task(base=DatabaseTask, bind=True, read_only=True, name="reading")
    def reading(self: Any) -> Any:
        return self.db.scalar(text("SELECT 1"))

    @app.task(base=DatabaseTask, bind=True, name="writing")
    def writing(self: Any) -> Any:
        return reading()

    with pytest.raises(CeleryAlchemyError, match=r"reading has read_only=True and was called like a function inside"):
        writing.apply().get()
    with (
        db.unit_of_work(read_only=True),
        pytest.raises(CeleryAlchemyError, match=r"writing has read_only=False .* read_only=True"),
    ):
        writing()
    with db.unit_of_work(read_only=True):
        assert reading() == 1
    assert reading() == 1, "outside any unit of work it has its own"


@pytest.mark.parametrize("driver", ["psycopg"])
def test_callbacks_run_when_it_ends_well(started: Started) -> None:
    _, db = started()
    ran: list[str] = []
    with db.unit_of_work(read_only=True) as session:
        session.execute(text("SELECT 1"))
        db.on_commit(lambda: ran.append("well"))
        assert ran == []
    assert ran == ["well"]
    with contextlib.suppress(ZeroDivisionError), db.unit_of_work(read_only=True) as session:
        session.execute(text("SELECT 1"))
        db.on_commit(lambda: ran.append("badly"))
        raise ZeroDivisionError
    assert ran == ["well"]


@pytest.mark.parametrize("driver", ["psycopg"])
def test_every_thread_may_hold_one_of_each(started: Started, database: Database) -> None:
    """Who holds an ordinary connection never queues for one to read with: they could wait for each other."""
    _, db = started()
    with contextlib.ExitStack() as stack:
        for _ in range(2):  # nested, and both of both kinds are in use now
            stack.enter_context(db.unit_of_work()).execute(text("SELECT 1"))
            stack.enter_context(db.unit_of_work(read_only=True)).execute(text("SELECT 1"))
        # Those of the test before this one may be ending still.
        eventually(lambda: len(database.connections("read_only")) == 4, "there are four connections")


@pytest.mark.parametrize("driver", ["psycopg"])
def test_on_engine_hears_of_the_engine_that_reads(started: Started) -> None:
    _, db = started()
    statements: list[str] = []
    db.on_engine(lambda engine: event.listen(engine, "before_cursor_execute", lambda *a: statements.append(a[2])))
    with db.unit_of_work(read_only=True) as session:
        session.execute(text("SELECT 42"))
    assert statements == ["SELECT 42"]


@pytest.mark.parametrize("driver", ["psycopg"])
def test_a_replica(database: Database, key: str) -> None:
    """What is read-only reads there, everything else stays here."""
    app, db = make_app(database.url("here"))
    app.conf.alchemy_replica_database_url = database.url("there")
    db.start_worker(WorkerPool(name="threads", concurrency=2))
    name = text("SHOW application_name")
    with db.unit_of_work() as session:
        assert session.scalar(name) == "here"
    with db.unit_of_work(read_only=True) as session:
        assert session.scalar(name) == "there"
    db.stop()


@pytest.mark.parametrize("value", ["yes", 2, "Transaction", None])
def test_other_values_are_refused(value: Any) -> None:
    app, _ = make_app("sqlite://")

    def read() -> None:
        pass

    with pytest.raises(ConfigurationError, match=r"must be False, True or 'transaction'"):
        app.task(base=DatabaseTask, read_only=value, name="odd", lazy=False)(read)


@pytest.mark.parametrize("database_url", ["sqlite://", "file"])
def test_sqlite(tmp_path: Any, database_url: str) -> None:
    _app, db = make_app("sqlite://" if database_url == "sqlite://" else f"sqlite:///{tmp_path / 'x.db'}")
    with db.unit_of_work() as session:
        session.execute(text("CREATE TABLE rows_ (id INTEGER PRIMARY KEY, key_ TEXT, note TEXT)"))
    with db.unit_of_work(read_only=True) as session:
        assert session.scalar(text("SELECT count(*) FROM rows_")) == 0
    with pytest.raises(CeleryAlchemyError, match="is read-only"), db.unit_of_work(read_only=True) as session:
        session.add(Row(key="x"))
        session.flush()
    with db.unit_of_work() as session:
        session.add(Row(key="x"))
    db.stop()


def test_the_users_own_engine(run_database: PostgreSQL, key: str) -> None:
    """Its connections are used for reading too, and are as they were afterwards."""
    from sqlalchemy import create_engine

    engine = create_engine(run_database.url("own"))
    app = Celery("own", broker="memory://", set_as_current=False)
    db = Alchemy(app, engine=engine)
    db.start_worker(WorkerPool(name="threads", concurrency=1))
    with db.unit_of_work(read_only=True) as session:
        session.execute(text("SELECT 1"))
    with pytest.raises(CeleryAlchemyError), db.unit_of_work(read_only=True) as session:
        session.add(Row(key=key))
        session.flush()
    with pytest.raises(ZeroDivisionError), db.unit_of_work() as session:
        session.add(Row(key=key))
        session.flush()
        raise ZeroDivisionError
    assert run_database.rows(key) == []
    engine.dispose()


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "eventlet", "solo"])
def test_workers(site: Site, run_database: PostgreSQL, key: str, pool: str) -> None:
    """A real worker announces the connections, reads, refuses to write, and leaves nothing open."""
    name = f"{site.prefix[:-1]}-reads-{pool}"
    with running(Worker(site, name, pool, run_database.url(name), modules=("endings", "reading"))) as worker:
        run_database.execute("INSERT INTO rows_ (key_, note) VALUES (:key, 'here')", key=key)
        outcomes = worker.call_together("read_only", [(key,)] * 12)
        assert [outcome.value for outcome in outcomes] == [["here"]] * 12
        refused = worker.call("write_though_read_only", key)
        assert "is read-only, but would write Row" in refused.message
        assert worker.call("insert", key, "written").state == "SUCCESS"
        assert run_database.rows(key) == ["here", "written"]
        databases.assert_not_busy(run_database, name)
        assert "and as much for read-only tasks" in worker.log()
        assert len(run_database.connections(name)) <= worker.probe()[0]["max_connections"]
    databases.assert_no_connections(run_database, name)
