"""Options of transactions: running again after a conflict, the statement timeout, the task's name on the server."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import URL, NullPool, create_engine, make_url, text
from support import databases, green, servers
from support.apps import make_app
from support.databases import PostgreSQL
from support.fleet import Fleet, fleet
from support.project.models import Row
from support.waiting import eventually
from support.worker import Site, Worker

from celery_alchemy import Alchemy, ConfigurationError, DatabaseTask, TransientDatabaseError
from celery_alchemy.loadtests.services.proxy import CountingProxy
from celery_alchemy.strategies.features.transaction_settings import LONGEST_NAME, shortened
from celery_alchemy.strategies.several.two_phase import short

POOLS = {"prefork": 3, "threads": 4, "gevent": 6, "eventlet": 6, "solo": 1}
SETTINGS = {"alchemy_isolation_retries": 200, "alchemy_statement_timeout_s": 1.5, "alchemy_application_name": True}


@pytest.fixture(scope="module")
def workers(site: Site, run_database: PostgreSQL, run_name: str) -> Iterator[Fleet]:
    modules = ("endings", "transient", "conflicts")
    with fleet(site, run_database, f"{run_name}-opt", pools=POOLS, modules=modules, settings=SETTINGS) as found:
        yield found


@pytest.fixture(params=POOLS)
def worker(request: pytest.FixtureRequest, workers: Fleet, run_database: PostgreSQL) -> Iterator[Worker]:
    worker = next(worker for worker in workers.workers if worker.pool == request.param)
    yield worker
    databases.assert_not_busy(run_database, worker.name)


def test_deadlocks_are_run_again_until_each_is_done_once(worker: Worker, run_database: PostgreSQL, key: str) -> None:
    both = [f"{key}-a", f"{key}-b"]
    for counter in both:
        run_database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=counter)
    outcomes = worker.call_together("lock_both_again", [(key, *both), (key, *reversed(both))] * 10)
    assert {outcome.state for outcome in outcomes} == {"SUCCESS"}, outcomes
    for counter in both:
        assert run_database.column("SELECT value FROM counters WHERE key_ = :key", key=counter) == [20]
    attempts = sorted(outcome.value for outcome in outcomes)
    assert sorted(worker.said(key)) == attempts, "callbacks run once, for the attempt that was committed"
    if worker.pool != "solo":
        assert attempts[-1] > 1, "there was a deadlock"
        assert "lost its transaction to another one" in worker.log()


def test_serialization_failures_come_at_commit_and_the_setting_says_how_often(
    worker: Worker, run_database: PostgreSQL, key: str
) -> None:
    outcomes = worker.call_together("number_again", [(key,)] * 16)
    assert {outcome.state for outcome in outcomes} == {"SUCCESS"}, outcomes
    assert sorted(map(int, run_database.rows(key))) == list(range(16))
    if worker.pool != "solo":
        assert max(outcome.value for outcome in outcomes) > 1


def test_the_attempts_have_an_end(worker: Worker, key: str) -> None:
    assert worker.call("always_loses", key).error == "TransientOperationalError"
    assert worker.said(key) == [1, 2, 3]


@pytest.mark.parametrize("how", ["nested", "core", "eager", "callback"])
def test_a_body_that_has_committed_anything_does_not_run_again(
    worker: Worker, run_database: PostgreSQL, key: str, how: str
) -> None:
    assert worker.call("loses_after_a_commit", key, how).error == "TransientOperationalError"
    assert worker.said(key) == [1]
    assert run_database.rows(key) == [how]


def test_a_body_that_has_only_read_inside_runs_again(worker: Worker, key: str) -> None:
    assert worker.call("loses_after_a_commit", key, "reading").error == "TransientOperationalError"
    assert worker.said(key) == [1, 2, 3]


def test_another_error_is_no_conflict(worker: Worker, key: str) -> None:
    assert worker.call("fails_otherwise", key).error == "DataError"
    assert worker.said(key) == [1]


def test_a_task_called_like_a_function_is_run_again_by_its_caller(
    worker: Worker, run_database: PostgreSQL, key: str
) -> None:
    assert worker.call("call_one_that_loses", key).value == 3
    assert run_database.rows(key) == ["attempt 3"]


def test_a_soft_time_limit_ends_the_attempts(workers: Fleet, key: str) -> None:
    worker = workers.workers[0]
    assert worker.pool == "prefork"
    for _ in range(3):
        assert worker.call("loses_until_its_limit", key).error == "SoftTimeLimitExceeded"


def test_the_server_shows_which_task_a_transaction_is_of(worker: Worker, run_database: PostgreSQL, key: str) -> None:
    task_id = worker.send("shop.tasks.a_name_that_is_much_longer_than_postgresql_likes_it", key)
    name, state = worker.wait(task_id).value
    assert state == "idle in transaction"
    assert name == f"shop.tasks.a_name_that_is_much_longer_than_postgresql[{task_id[:8]}]"
    assert {one.state for one in run_database.connections(worker.name)} <= {"idle"}, "afterwards it has its own again"


def test_the_server_stops_a_statement_that_takes_too_long(worker: Worker, run_database: PostgreSQL, key: str) -> None:
    outcome = worker.call("sleep_in_a_statement", key, 20)
    assert "statement timeout" in outcome.message, outcome
    assert run_database.rows(key) == []
    assert worker.call("sleep_in_a_statement", key, 0.1).state == "SUCCESS"


# -- without a worker ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_options") as database:
        yield database


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pymysql"])
@pytest.mark.parametrize("mode", [False, True, "transaction"])
def test_every_driver_has_a_statement_timeout(request: pytest.FixtureRequest, driver: str, mode: Any) -> None:
    database = request.getfixturevalue("mariadb" if driver == "pymysql" else "run_database")
    _, db = make_app(green.url_with(database, driver, "options"), changes={"alchemy_statement_timeout_s": 0.3})
    asking = "SELECT @@max_statement_time" if driver == "pymysql" else "SHOW statement_timeout"
    with db.unit_of_work(read_only=mode) as session:
        assert str(session.execute(text(asking)).scalar_one()) in {"0.3", "300ms"}
    with pytest.raises(Exception, match=r"timeout|max_statement_time"), db.unit_of_work(read_only=mode) as session:
        # SLEEP alone is interrupted without an error.
        slow = (
            "SELECT COUNT(*), SLEEP(5) FROM rows_, seq_1_to_1000000000" if driver == "pymysql" else "SELECT pg_sleep(5)"
        )
        session.execute(text(slow))
    db.stop()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("alchemy_isolation_retries", -1, "alchemy_isolation_retries is -1, but it must be a whole number, 0 or more"),
        ("alchemy_isolation_retries", True, "is True, but it must be a whole number"),
        ("alchemy_isolation_retries", "3", "is '3', but it must be"),
        ("alchemy_statement_timeout_s", 0, "is 0, but it must be a number of seconds above 0"),
        ("alchemy_statement_timeout_s", "10s", "is '10s', but it must be"),
        ("alchemy_statement_timeout_s", float("inf"), "is inf, but it must be a number of seconds above 0"),
        ("alchemy_statement_timeout_s", 3e6, "is 3000000.0, but it must be"),
        ("alchemy_statement_timeout_s", 3, "the database 'default' is sqlite, which stops no statement by itself"),
        ("alchemy_application_name", "shop", "is 'shop', but it must be True or False"),
        ("alchemy_external_pooler", "pgpool", "alchemy_external_pooler is 'pgpool', but it must be 'pgbouncer'"),
        ("alchemy_external_pooler", "pgbouncer", "the database 'default' is sqlite: PgBouncer is for PostgreSQL"),
    ],
)
def test_bad_settings(name: str, value: Any, message: str) -> None:
    _, db = make_app("sqlite://", changes={name: value})
    with pytest.raises(ConfigurationError, match=message):
        db.strategy  # noqa: B018


@pytest.mark.parametrize("value", [-1, True, "many"])
def test_bad_attributes(value: Any) -> None:
    app, _ = make_app("sqlite://")
    with pytest.raises(ConfigurationError, match="must be a whole number, 0 or more"):

        @app.task(base=DatabaseTask, isolation_retries=value)
        def task() -> None: ...

        task()


def test_the_name_costs_one_round_trip(run_database: PostgreSQL) -> None:
    costs = {}
    for named in (False, True):
        with CountingProxy(make_url(run_database.url("options"))) as proxy:
            url = proxy.url.render_as_string(hide_password=False)
            app, db = make_app(url, changes={"alchemy_application_name": named})

            @app.task(base=DatabaseTask, bind=True, name=f"read {named}")
            def read(self: Any) -> None:
                self.db.execute(text("SELECT 1"))

            read.apply().get()
            before = proxy.round_trips
            read.apply().get()
            costs[named] = proxy.round_trips - before
            db.stop()
    assert costs == {False: 3, True: 4}


@pytest.mark.parametrize(
    "label", ["short[1234]", "x" * 100, "x" * 70 + "[0123456789abcdef]", "ü" * 60 + "[0123456789]"]
)
def test_a_name_fits(label: str) -> None:
    found = shortened(label)
    assert len(found.encode()) <= LONGEST_NAME
    assert found == label.replace("ü", "?") or "[" not in label or found.endswith("[01234567]")


STRANGE = {
    "NUL": "a\0b",
    "surrogate": "a\ud800b",
    "escaped bytes": b"a\xffb".decode(errors="surrogateescape"),
    "lines": "a\nb\r\x1b[31m",
    "not in LATIN1": "задача-数",
    "emoji": "🦆" * 70,
    "not in ASCII": "tâche",
    "quotes": "'; \\ %s %(x)s :y $1 --",
    "empty": "",
}


@pytest.fixture(scope="module", params=["LATIN1", "SQL_ASCII", "UTF8"])
def encoded(request: pytest.FixtureRequest, postgresql_server: URL, run_name: str) -> Iterator[PostgreSQL]:
    """A database that has not every letter."""
    name = f"{run_name}_{request.param.lower()}"
    admin = create_engine(postgresql_server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        how = f"ENCODING '{request.param}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        connection.exec_driver_sql(f'CREATE DATABASE "{name}" {how}')
        database = PostgreSQL(postgresql_server.set(database=name))
        yield database
        database.engine.dispose()
        connection.exec_driver_sql(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("client_encoding", ["", "latin1"])
def test_a_name_that_the_database_has_no_letters_for(encoded: PostgreSQL, driver: str, client_encoding: str) -> None:
    """It stands in a task's id, in its name, or in both."""
    if not client_encoding and "sql_ascii" in str(encoded.engine.url.database):
        client_encoding = "utf8"  # without one psycopg decodes nothing, which SQLAlchemy cannot use
    url = make_url(green.url_with(encoded, driver, "names"))
    url = url.update_query_dict({"client_encoding": client_encoding} if client_encoding else {})
    app, db = make_app(url.render_as_string(hide_password=False), changes={"alchemy_application_name": True})

    def task(self: Any) -> str:
        return str(self.db.execute(text("SHOW application_name")).scalar_one())

    for strange in STRANGE.values():
        for name, task_id in ((f"shop.{strange}", "1234"), ("shop.task", f"{strange}1234"), (strange or "x", strange)):
            shown = app.task(base=DatabaseTask, bind=True, name=name)(task).apply(task_id=task_id).get()
            assert shown.isascii()
            assert shown.isprintable()
            assert len(shown) <= LONGEST_NAME
            assert shown.startswith(("shop.", "?", "a?b", "t?che", strange[:3]))
    db.stop()


def test_a_prepared_transaction_of_a_database_with_a_strange_name() -> None:
    """Its name stands between quotes in PREPARE TRANSACTION, and MySQL lets it have 64 bytes."""
    names = {short(strange) for strange in [*STRANGE.values(), "shop", "my.shop-2", "a/b", "a:b"]}
    assert len(names) == len(STRANGE) + 4, "each has its own"
    assert {"shop", "my.shop-2"} < names
    for name in names:
        assert len(name) <= 16
        assert re.fullmatch(r"[A-Za-z0-9_.~-]*", name)


def test_a_worker_of_tasks_with_strange_ids(worker: Worker, run_database: PostgreSQL, key: str) -> None:
    for name, strange in STRANGE.items():
        if strange:
            worker.send_only("insert", key, name, task_id=f"{strange}-{key}")
    wanted = sorted(name for name, strange in STRANGE.items() if strange)
    eventually(lambda: sorted(run_database.rows(key)) == wanted, "all are committed")


def test_running_again_needs_no_worker(run_database: PostgreSQL, key: str) -> None:
    app: Celery
    db: Alchemy
    app, db = make_app(run_database.url("options"))
    seen: list[int] = []

    @app.task(base=DatabaseTask, bind=True, isolation_retries=3)
    def task(self: Any) -> int:
        seen.append(len(seen))
        self.db.add(Row(key=key, note=str(len(seen))))
        if len(seen) < 3:
            self.db.execute(text("DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40P01'; END $$"))
        return len(seen)

    assert task.apply().get() == 3
    assert run_database.rows(key) == ["3"]
    seen.clear()
    assert task() == 3, "called like a function, where no unit of work is open"
    db.stop()


def test_it_runs_once_where_something_was_committed(run_database: PostgreSQL, there: PostgreSQL, key: str) -> None:
    """By the body itself, on another database, or for a callback that fails: a second run would do it twice."""
    app, db = make_app(run_database.url("options"), changes={"alchemy_databases": {"reports": there.url("options")}})
    conflict = "DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40001'; END $$"

    @app.task(base=DatabaseTask, bind=True, isolation_retries=3)
    def task(self: Any, how: str) -> None:
        self.db.add(Row(key=key, note=how))
        if how == "commits":
            self.db.commit()
        elif how == "begins":
            self.db.rollback()
            with self.db.begin():
                self.db.add(Row(key=key, note=how))
        elif how == "elsewhere":
            session = db.databases["reports"].session
            session.add(Row(key=key, note=how))
            session.commit()
        elif how == "callback":
            db.on_commit(lambda: db.session.execute(text(conflict)), raises=True)
            return
        self.db.execute(text(conflict))

    for how in ("commits", "begins", "elsewhere", "callback"):
        with pytest.raises(TransientDatabaseError):
            task.apply((how,)).get()
    assert run_database.rows(key) == ["commits", "begins", "callback"]
    assert there.rows(key) == ["elsewhere"]
    task.isolation_retries = -1
    with pytest.raises(TransientDatabaseError):
        task.apply(("nothing",)).get()
    for one in db.databases.values():
        one.stop()
