"""The servers that a run can ask for by name, and the distance it can put between them and its workers."""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine, text

from celery_alchemy.loadtests.errors import ServiceError
from celery_alchemy.loadtests.services.databases import database_server
from celery_alchemy.loadtests.services.guard import with_package
from celery_alchemy.loadtests.services.proxy import Conversation, DistantProxy
from celery_alchemy.loadtests.services.rundir import run_directory

DELAY_S = 0.1
CLIENTS = 8


def test_a_durable_server_at_a_distance() -> None:
    with run_directory() as run, database_server(run, "durable+20ms") as server:
        assert server.label.startswith("PostgreSQL")
        assert "(embedded: TCP with 20 ms added, fsync on, psycopg)" in server.label
        with server.fresh_database(run, "far") as url:
            assert (url.host, server.url.host) == ("127.0.0.1", None)
            engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                for setting in ("fsync", "full_page_writes", "synchronous_commit"):
                    assert connection.execute(text(f"SHOW {setting}")).scalar_one() == "on"
                began = time.monotonic()
                connection.execute(text("SELECT 1"))
                assert time.monotonic() - began >= 0.02


def test_the_default_is_fast_and_near() -> None:
    with run_directory() as run, database_server(run) as server:
        assert "(embedded: Unix socket, fsync off, psycopg)" in server.label
        engine = create_engine(server.url, poolclass=NullPool)
        with engine.connect() as connection:
            assert connection.execute(text("SHOW fsync")).scalar_one() == "off"
        assert server.through is None


@pytest.mark.skipif(shutil.which("mariadbd") is None, reason="no mariadbd here")
def test_a_mariadb_of_the_runs_own() -> None:
    with run_directory() as run, database_server(run, "mariadb+1ms") as server:
        assert server.label.startswith("MariaDB")
        assert "TCP with 1 ms added, fsync on" in server.label
        with server.fresh_database(run, "far") as url:
            engine = create_engine(url, poolclass=NullPool)
            with engine.connect() as connection:
                flushed = connection.execute(text("SELECT @@innodb_flush_log_at_trx_commit")).scalar_one()
                assert int(flushed) == 1


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with run_directory() as run, pytest.raises(ServiceError, match=r"fast, durable and mariadb.*durable\+0\.25ms"):
        database_server(run, "durible+1ms").__enter__()


class Watched(DistantProxy):
    together = 0

    def pass_on(self, talk: Conversation, data: bytes, *, from_client: bool) -> None:
        super().pass_on(talk, data, from_client=from_client)
        self.together = max(self.together, len({id(talk) for _, talk, _ in self._on_the_way}))


def test_clients_of_a_distant_database_do_not_wait_for_each_other() -> None:
    """Answers to several are on the way at one time, each takes the delay, and what is long arrives whole."""
    with (
        run_directory() as run,
        database_server(run) as server,
        Watched(server.url, DELAY_S) as proxy,
    ):
        engine = create_engine(proxy.url, pool_size=CLIENTS, isolation_level="AUTOCOMMIT")
        connected = threading.Barrier(CLIENTS)

        def ask(number: int) -> float:
            with engine.connect() as connection:
                connected.wait(30)
                began = time.monotonic()
                asked = {"n": 3_000_000 + number}
                assert len(connection.execute(text("SELECT repeat('x', :n)"), asked).scalar_one()) == asked["n"]
                return time.monotonic() - began

        with ThreadPoolExecutor(CLIENTS) as executor:
            assert min(executor.map(ask, range(CLIENTS))) >= DELAY_S
        assert proxy.together > 1
        engine.dispose()


def test_a_python_child_finds_the_package_and_no_second_copy_of_its_folders() -> None:
    """Also where the package is not installed: the path begins with the folder that holds it."""
    place = with_package({"PYTHONPATH": "theirs"})["PYTHONPATH"].split(os.pathsep)
    assert place[1:] == ["theirs"]
    assert (Path(place[0]) / "celery_alchemy" / "__init__.py").exists()
    assert not (Path(place[0]) / "py.typed").exists(), "this is the package itself"
