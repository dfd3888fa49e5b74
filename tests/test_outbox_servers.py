"""The outbox on servers that are set up in a seldom way, and with brokers that stand still."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text
from support import databases
from support.outbox import TABLE, Shop
from support.own_mariadb import own_mariadb
from support.project.models import Row

from celery_alchemy.loadtests.services.rundir import run_directory
from celery_alchemy.workers.sending.outbox import send_waiting


@pytest.fixture(scope="module", params=["STATEMENT", "MIXED", "ROW"])
def logging_server(request: pytest.FixtureRequest) -> Iterator[databases.MariaDB]:
    """A server that writes a binary log, for its replicas, in this format."""
    settings = ("--log-bin=binlog", "--server-id=1", f"--binlog-format={request.param}")
    with (
        run_directory() as run,
        own_mariadb(run, *settings) as server,
        databases.new_mariadb(server.url, "logged") as database,
    ):
        assert database.column("SELECT @@log_bin") == [1]
        assert database.column("SELECT @@binlog_format") == [request.param]
        yield database


@pytest.mark.parametrize("driver", ["pymysql", "mysqldb"])
@pytest.mark.parametrize("outbox_is", [True, "relay"], ids=str)
def test_whatever_the_binary_log_is_written_in(
    logging_server: databases.MariaDB, driver: str, outbox_is: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At READ COMMITTED, InnoDB refuses to write where statements are logged."""
    if driver == "mysqldb":
        pytest.importorskip("MySQLdb")
    shop = Shop(logging_server, logging_server.url("outbox").replace("pymysql", driver), alchemy_outbox=outbox_is)
    logging_server.execute(f"DELETE FROM {TABLE}")
    try:
        with shop.db.unit_of_work() as session:
            session.add(Row(key=key, note="1"))
            for number in range(3):
                shop.note.delay_on_commit(number)
        if outbox_is is not True:
            assert shop.arguments() == []
            assert send_waiting(shop.db) == (3, 0)
        assert shop.arguments() == [[0], [1], [2]]
        assert shop.waiting() == []
        with shop.broker_gone(monkeypatch, refused="bad"), shop.db.unit_of_work():
            shop.note.delay_on_commit("bad")
        with shop.broker_gone(monkeypatch, refused="bad"), contextlib.suppress(Exception):
            shop.make_due()
            send_waiting(shop.db)
        assert logging_server.column(f"SELECT attempts FROM {TABLE}")[0] >= 1, "its failure is recorded"
    finally:
        shop.stop()


def test_senders_and_committers_where_statements_are_logged(logging_server: databases.MariaDB) -> None:
    """There are locks between the rows then: who meets them tries again, and nothing is lost or sent twice."""
    shop = Shop(logging_server, logging_server.url("outbox"), alchemy_outbox="relay")
    logging_server.execute(f"DELETE FROM {TABLE}")
    errors: list[BaseException] = []
    committed = threading.Event()

    def commits(first: int) -> None:
        for number in range(first, first + 40):
            with shop.db.unit_of_work():
                shop.note.delay_on_commit(number)

    def sends() -> None:
        while not committed.is_set():
            send_waiting(shop.db)

    def watched(work: Any, *args: Any) -> threading.Thread:
        def run() -> None:
            try:
                work(*args)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    try:
        senders = [watched(sends) for _ in range(2)]
        for thread in [watched(commits, first) for first in (0, 100)]:
            thread.join()
        committed.set()
        for thread in senders:
            thread.join()
        assert errors == []
        send_waiting(shop.db)
        assert sorted(argument for (argument,) in shop.arguments()) == [*range(40), *range(100, 140)]
        with logging_server.engine.connect() as connection:
            assert connection.scalar(text(f"SELECT count(*) FROM {TABLE}")) == 0
    finally:
        shop.stop()
