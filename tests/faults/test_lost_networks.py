"""A network that vanishes without a word: keepalives find out, also for what is idle, and no task hangs for ever."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url
from support.databases import PostgreSQL
from support.far import FarNetwork, far_network
from support.faults import FULL
from support.waiting import eventually
from support.worker import Start

from celery_alchemy.loadtests.services.proxy import Proxy

#: What the library sets itself takes a minute to strike; the mechanism is the same with less patience.
QUICKLY = {} if FULL else {"keepalives_idle": "1", "keepalives_interval": "1", "tcp_user_timeout": "2000"}
WITHIN_S = 100 if FULL else 15


@pytest.fixture
def network(run_database: PostgreSQL, tmp_path: Path) -> Iterator[FarNetwork]:
    directory = run_database.column("SHOW unix_socket_directories")[0].split(",")[0].strip()
    port = int(run_database.column("SHOW port")[0])
    url = make_url(run_database.url("far")).difference_update_query(["host"]).update_query_dict(QUICKLY)
    with far_network(url, directory, port, tmp_path) as network:
        yield network


@pytest.mark.timeout(300)
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_a_network_that_vanishes(
    start: Start, network: FarNetwork, run_database: PostgreSQL, key: str, pool: str, driver: str
) -> None:
    name = f"far-{key[:8]}"
    url = network.url.set(drivername=f"postgresql+{driver}").update_query_dict({"application_name": name})
    text = url.render_as_string(hide_password=False)
    with start(pool, url=text, concurrency=2, modules=("endings", "transient")) as worker:
        worker.call("write_once", key, "before", 0)
        busy = worker.send("write_once", key, "busy", 60)
        eventually(lambda: [one for one in run_database.busy(name) if "pg_sleep" in one.query], "it sleeps")
        network.vanish()
        eventually(lambda: "TransientOperationalError" in worker.log(), "the kernel has noticed", within_s=WITHIN_S)
        assert worker.wait(busy).error == "TransientOperationalError"
        time.sleep(0 if not FULL else WITHIN_S)
        network.come_back()
        # Connections that were idle all the time are dead by now, or alive again: no task fails either way.
        outcomes = worker.call_together("write_once", [(key, f"after {number}", 0) for number in range(4)])
        assert [outcome.state for outcome in outcomes] == ["SUCCESS"] * 4, outcomes
    assert "busy" not in run_database.rows(key)


@pytest.mark.parametrize("strategy", ["local", "scoped", "per_process"])
def test_a_soft_limit_in_a_statement_that_nobody_answers(
    start: Start, proxy: Proxy, run_database: PostgreSQL, key: str, strategy: str
) -> None:
    """The request to cancel it is not answered either: the limit is raised all the same, within seconds."""
    with start("prefork", through=proxy, strategy=strategy, concurrency=1, modules=("endings", "transient")) as worker:
        task_id = worker.send("write_once", key, "busy", 30, soft_time_limit=1)
        eventually(lambda: [one for one in run_database.busy(worker.name) if "pg_sleep" in one.query], "it sleeps")
        proxy.fall_silent()
        assert worker.wait(task_id).error == "SoftTimeLimitExceeded"
        proxy.recover()
        assert worker.call("write_once", key, "after", 0).state == "SUCCESS"
        assert run_database.rows(key) == ["after"]
        proxy.cut()
