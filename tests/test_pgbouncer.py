"""alchemy_external_pooler: behind a real PgBouncer in transaction mode, under every worker pool."""

from collections.abc import Iterator

import pytest
from sqlalchemy import URL, make_url, text
from support import green
from support.apps import make_app
from support.databases import PostgreSQL
from support.pgbouncer import pgbouncer
from support.worker import Site, Worker, running

SERVER_CONNECTIONS = 3
POOLS = {"prefork": 4, "threads": 6, "gevent": 12, "eventlet": 12, "solo": 1}


@pytest.fixture(scope="module")
def pooled(run_database: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[URL]:
    """The database of the run, through a PgBouncer with few connections to the server."""
    server = make_url(run_database.url("unused")).difference_update_query(["application_name"])
    with pgbouncer(server, tmp_path_factory.mktemp("pgbouncer"), pool_size=SERVER_CONNECTIONS) as url:
        yield url


def settings(**more: object) -> dict[str, object]:
    return {
        "alchemy_external_pooler": "pgbouncer",
        "alchemy_statement_timeout_s": 7,
        "alchemy_application_name": True,
        **more,
    }


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_tasks_share_the_servers_connections(
    site: Site, pooled: URL, run_database: PostgreSQL, key: str, pool: str, driver: str
) -> None:
    name = f"{site.prefix[:-1]}-pooled-{pool}-{driver}"
    url = pooled.set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
    worker = Worker(
        site, name, pool, database_url=url, concurrency=POOLS[pool], modules=("endings", "pooled"), settings=settings()
    )
    with running(worker):
        notes = [str(number) for number in range(60)]
        outcomes = worker.call_together("write_through_pooler", [(key, note) for note in notes])
        assert {outcome.state for outcome in outcomes} == {"SUCCESS"}, outcomes
        assert all(outcome.value[0].startswith("write_through_pooler[") for outcome in outcomes)
        assert {outcome.value[1] for outcome in outcomes} == {"7s"}
        assert len({outcome.value[2] for outcome in outcomes}) <= SERVER_CONNECTIONS
        if pool != "solo":
            assert len({outcome.value[2] for outcome in outcomes}) > 1, "a transaction finds another connection"
        assert sorted(run_database.rows(key)) == sorted(notes)
        read = worker.call_together("read_through_pooler", [(key,)] * 20)
        assert [outcome.value for outcome in read] == [[60, "on"]] * 20
        assert worker.call("write_though_read_only_through_pooler", key).state == "FAILURE"
        after = worker.call_together("write_through_pooler", [(key, f"after {note}") for note in notes[:10]])
        assert {outcome.state for outcome in after} == {"SUCCESS"}, "no connection was left read-only"


def test_nothing_is_left_on_the_servers_connections(pooled: URL, run_database: PostgreSQL, key: str) -> None:
    """What one client sets, the next would find."""
    app, db = make_app(pooled.render_as_string(hide_password=False), changes=settings())
    asking = text(
        "SELECT current_setting('statement_timeout'), current_setting('default_transaction_read_only'),"
        " current_setting('client_connection_check_interval')"
    )
    before = run_database.engine.connect().execute(asking).one()
    for mode in (False, True, "transaction"):
        with db.unit_of_work(read_only=mode) as session:
            session.execute(text("SELECT 1"))
    db.stop()
    _, plain = make_app(pooled.render_as_string(hide_password=False))
    with plain.engine.connect() as connection:
        found = connection.execute(asking).one()
        names = connection.scalar(text("SELECT count(*) FROM pg_prepared_statements"))
    assert found[:2] == before[:2]
    assert names == 0
    plain.stop()
    run_database.engine.dispose()
    assert app is not None


def test_without_the_setting_prepared_statements_collide(pooled: URL) -> None:
    """What the setting is for: psycopg prepares a statement on its fifth use, on whatever connection that falls."""
    _, db = make_app(pooled.render_as_string(hide_password=False))
    with pytest.raises(Exception, match=r"prepared statement .* (already exists|does not exist)"):
        for _ in range(12):
            with db.engine.connect() as one, db.engine.connect() as other:
                for connection in (one, other):
                    connection.execute(text("SELECT 1")).all()
                    connection.commit()
    db.stop()


def test_the_default_may_be_overridden(run_database: PostgreSQL) -> None:
    url = green.url_with(run_database, "psycopg", "override")
    options = {"connect_args": {"prepare_threshold": 9}}
    _, db = make_app(url, changes=settings(alchemy_engine_options=options))
    with db.engine.connect() as connection:
        assert connection.connection.dbapi_connection.prepare_threshold == 9
    db.stop()
    _, db = make_app(url, changes=settings())
    with db.engine.connect() as connection:
        assert connection.connection.dbapi_connection.prepare_threshold is None
    db.stop()


def test_a_part_behind_the_pooler_leaves_no_connection_read_only(
    pooled: URL, run_database: PostgreSQL, key: str
) -> None:
    """The default database is asked directly, another one through the pooler, by a task that only reads."""
    url = pooled.render_as_string(hide_password=False)
    other = {"reports": {"url": url, "external_pooler": "pgbouncer"}}
    _, db = make_app(run_database.url("part"), changes={"alchemy_databases": other})
    for _ in range(SERVER_CONNECTIONS * 2):
        with db.unit_of_work(read_only=True) as session:
            assert session.scalar(text("SELECT 1")) == 1
            reports = db.databases["reports"].session
            assert reports.scalar(text("SHOW transaction_read_only")) == "on"
    for one in db.databases.values():
        one.stop()
    # Without statements prepared on the server, which another test has left there.
    _, plain = make_app(url, changes={"alchemy_engine_options": {"connect_args": {"prepare_threshold": None}}})
    for number in range(SERVER_CONNECTIONS * 2):
        with plain.engine.begin() as connection:
            connection.execute(
                text("INSERT INTO rows_ (key_, note) VALUES (:key, :note)"), {"key": key, "note": str(number)}
            )
    assert len(run_database.rows(key)) == SERVER_CONNECTIONS * 2
    plain.stop()
