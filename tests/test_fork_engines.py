"""Engines and connection pools that celery-alchemy was never told of: no fork shares a connection of theirs."""

import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url
from support import databases, forking, preloaded, servers
from support import worker as workers

KINDS = (
    "engine", "copy", "full", "disposed", "recreated", "null", "static", "singleton", "assertion", "of_the_user",
    "without_engine", "from_url", "detached", "in_thread",
)  # fmt: skip


@pytest.fixture(scope="module")
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_engines") as database:
        yield database


Process = tuple[forking.Script, databases.Database, str]


@pytest.fixture(scope="module", params=["before", "after"])
def process(request: pytest.FixtureRequest, driver: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A process whose Engines are made, and connected, before or after there is an Alchemy."""
    forking.require(driver)
    database = request.getfixturevalue("database" if driver.startswith("psycopg") else "mariadb")
    url = make_url(database.url("engines"))
    url = url.set(drivername=f"{url.get_backend_name()}+{driver}").render_as_string(hide_password=False)
    key, log = uuid.uuid4().hex, tmp_path_factory.mktemp("forks") / "engines.log"
    kinds = (*KINDS, "asyncio") if driver == "psycopg" else KINDS
    before = kinds if request.param == "before" else ()
    with forking.script("fork_engines", log, url=url, key=key, before=before) as script:
        yield script, database, key


def fork(process: Process, kind: str) -> None:
    """Let a child spoil the transaction that its parent has open, and do work of its own."""
    script, database, key = process
    child: dict[str, Any] = script.ask(kind=kind)
    assert (child["status"], child["hung"], child.get("error")) == (0, False, None)
    assert child["answer"] not in child["parents"], "the child uses a connection of its parent"
    assert sorted(database.rows(f"{key}-{kind}")) == ["child", "parent"]


@pytest.mark.parametrize("driver", forking.DRIVERS, scope="module")
@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_nobody_told_of_is_guarded(process: Process, kind: str) -> None:
    fork(process, kind)


@pytest.mark.parametrize("driver", ["psycopg"], scope="module")
def test_an_async_engine_is_guarded(process: Process) -> None:
    """Nor does the child end what the parent's event loop has open."""
    fork(process, "asyncio")


@pytest.fixture(scope="module")
def routing(site: workers.Site, database: databases.PostgreSQL) -> Iterator[workers.Worker]:
    name = f"{site.prefix[:-1]}-routing"
    settings = {"imports": ["scripts.routed_tasks"], "alchemy_databases": {"routed": database.url(name)}}
    worker = workers.Worker(site, name, "prefork", database_url=database.url(name), settings=settings)
    with workers.running(worker):
        yield worker
    databases.assert_no_connections(database, name)


@pytest.mark.parametrize("task", ["route", "route_in_unit"])
def test_a_session_that_routes_between_engines_of_a_module(
    routing: workers.Worker, database: databases.PostgreSQL, key: str, task: str
) -> None:
    """Under prefork, used at import: each task gets its own answers, and each row is there."""
    outcomes = routing.call_together(task, [(key, f"task {number}") for number in range(20)])
    assert [outcome.state for outcome in outcomes] == ["SUCCESS"] * 20, outcomes
    assert all(outcome.value["right"] for outcome in outcomes)
    assert len({outcome.value["pid"] for outcome in outcomes}) == 2
    assert sorted(database.rows(key)) == sorted(f"task {number}" for number in range(20))


HELD = """
import os, sys
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from celery import Celery
from celery_alchemy import Alchemy

Alchemy(Celery("held", broker="memory://"), engine=create_engine(sys.argv[1]))
engine = create_engine(sys.argv[1])
connection, raw, session = engine.connect(), engine.raw_connection(), Session(engine)
connection.execute(text("SELECT 1"))
session.execute(text("SELECT 1"))
uses = (
    lambda: connection.execute(text("SELECT 1")), connection.commit, lambda: raw.cursor(), lambda: raw.commit(),
    lambda: session.execute(text("SELECT 1")), session.commit,
)
child = os.fork()
if not child:
    for use in uses:
        try:
            use()
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    connection.close(), raw.close(), session.close()
    with engine.connect() as own:
        print("own", own.scalar(text("SELECT 1")), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent", connection.scalar(text("SELECT 1")))
"""


@pytest.mark.parametrize("driver", forking.DRIVERS)
def test_who_uses_what_the_parent_has_checked_out_reads_why_that_cannot_be(
    request: pytest.FixtureRequest, driver: str
) -> None:
    """A connection that a module opens at import, and a Session with a transaction of that time."""
    forking.require(driver)
    database = request.getfixturevalue("database" if driver.startswith("psycopg") else "mariadb")
    url = make_url(database.url("held"))
    url = url.set(drivername=f"{url.get_backend_name()}+{driver}")
    script = [sys.executable, "-c", HELD, url.render_as_string(hide_password=False)]
    done = preloaded.run(script, cwd=Path(__file__).parent, env=os.environ, timeout=250)
    assert done.returncode == 0, done.stderr
    refused = [line for line in done.stdout.splitlines() if "was checked out before the process was forked" in line]
    assert len(refused) == 6, done.stdout
    assert done.stdout.splitlines()[-2:] == ["own 1", "parent 1"]
    assert "AssertionError" not in done.stdout + done.stderr
