"""Round trips are counted, all of them and no others."""

from collections.abc import Iterator

import pytest
from sqlalchemy import URL, NullPool, create_engine
from support import loadworkers as load
from support import servers
from support.worker import Site

from celery_alchemy.loadtests.errors import WorkerError
from celery_alchemy.loadtests.overhead.round_trips import measure
from celery_alchemy.loadtests.services import harness
from celery_alchemy.loadtests.services.databases import database_server
from celery_alchemy.loadtests.services.proxy import CountingProxy
from celery_alchemy.loadtests.services.rundir import run_directory
from celery_alchemy.loadtests.tasks.patterns import OURS
from celery_alchemy.loadtests.tasks.workloads import WORKLOADS

BEGIN, COMMIT = 1, 1


@pytest.fixture(scope="module")
def bench(postgresql_server: URL, site: Site) -> Iterator[load.Bench]:
    yield from _bench(postgresql_server, site)


def _bench(server_url: URL, site: Site) -> Iterator[load.Bench]:
    with harness.services(server_url.render_as_string(hide_password=False), site.urls.celery) as found:
        yield found


def test_the_proxy_counts_each_answer_once(postgresql_server: URL) -> None:
    with CountingProxy(postgresql_server) as proxy:
        engine = create_engine(proxy.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection, engine.connect() as other:
            before = proxy.round_trips
            assert before > 0  # connecting
            for count in range(1, 4):
                connection.exec_driver_sql("SELECT 1")
                other.exec_driver_sql("SELECT 2")
                assert proxy.round_trips == before + 2 * count
            # An answer in many pieces, and a question in many pieces.
            assert len(connection.exec_driver_sql("SELECT repeat('x', 3000000)").scalar_one()) == 3_000_000
            assert connection.exec_driver_sql(f"SELECT length('{'x' * 3_000_000}')").scalar_one() == 3_000_000
            assert proxy.round_trips == before + 8
        engine.dispose()


def test_the_proxy_passes_on_that_either_side_hung_up(postgresql_server: URL) -> None:
    with CountingProxy(postgresql_server) as proxy:
        engine = create_engine(proxy.url, poolclass=NullPool)
        with engine.connect() as connection:
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        admin = create_engine(postgresql_server, poolclass=NullPool)
        with admin.connect() as connection, pytest.raises(Exception, match=r"terminat|closed"), engine.connect() as cut:
            assert cut.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() != pid
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = "
                f"{cut.exec_driver_sql('SELECT pg_backend_pid()').scalar_one()}"
            )
            cut.exec_driver_sql("SELECT 1")
        # And still serves others.
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT 1").scalar_one() == 1


def test_the_proxy_reaches_a_server_behind_a_unix_socket() -> None:
    with run_directory() as run, database_server(run) as server, CountingProxy(server.url) as proxy:
        engine = create_engine(proxy.url, poolclass=NullPool)
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT 1").scalar_one() == 1
        assert proxy.round_trips > 0


def test_a_task_costs_what_its_statements_and_its_transaction_cost(bench: load.Bench) -> None:
    """Nothing is added by our pattern, under any strategy; a connection for each task adds connecting."""
    seen: list[str] = []
    patterns, workloads = (OURS, "with_session", "null_pool"), ("select", "statements", "mix")
    counted = measure(bench, patterns, workloads, tasks=10, progress=seen.append)
    assert seen == list(patterns)
    assert list(counted) == list(workloads)
    for name, expected in {
        "select": BEGIN + 1 + COMMIT,
        "statements": BEGIN + 20 + 1 + COMMIT,
    }.items():
        assert counted[name][OURS] == counted[name]["with_session"] == expected
        assert counted[name]["null_pool"] > expected
    scoped = measure(bench, [OURS], workloads, tasks=10, strategy="scoped")
    # Tasks of the mix may meet and be tried again, and a driver may prepare one statement more: less than one for each.
    assert max(counted["mix"][OURS], scoped.pop("mix")[OURS]) < counted.pop("mix")["with_session"] + 1
    assert {name: {OURS: trips[OURS]} for name, trips in counted.items()} == scoped


def test_our_pattern_spares_the_second_rollback_of_mariadb(site: Site) -> None:
    for bench in _bench(servers.mariadb().set(database="mysql"), site):
        counted = measure(bench, (OURS, "with_session"), ["insert"], tasks=10)
        assert counted["insert"] == {OURS: 1 + COMMIT, "with_session": 1 + COMMIT + 1}


def test_a_task_that_fails_is_not_counted(bench: load.Bench) -> None:
    with load.load_worker(bench, "solo", concurrency=1) as worker:
        replies = worker.run(WORKLOADS["mix"], range(10))
        assert sorted(reply.error_type or "" for reply in replies) == [""] * 9 + ["TransferRefused"]
        worker.rows("TRUNCATE account CASCADE")
        with pytest.raises(WorkerError, match=r"select.*WrongResult"):
            worker.run(WORKLOADS["select"], [0])
        worker.worker.process.stop(at_once=True)
        with pytest.raises(WorkerError, match=r"20 tasks of slow_query.*not answered"):
            worker.run(WORKLOADS["slow_query"], range(20))
