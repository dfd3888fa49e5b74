"""The outbox: any number of senders, in threads, forks and transactions over several databases."""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text
from support import databases, servers
from support.databases import PostgreSQL
from support.outbox import TABLE, Shop
from support.project.models import Row

from celery_alchemy.loadtests.errors import ServiceError
from celery_alchemy.loadtests.services.rundir import run_directory
from celery_alchemy.loadtests.services.servers import PostgreSQLServer
from celery_alchemy.workers.sending import broker, outbox


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_many_senders_at_once(request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message once, in the order of its transaction, while others are committed."""
    shop = Shop(request.getfixturevalue("run_database" if kind == "postgresql" else kind), alchemy_outbox="relay")
    monkeypatch.setattr("celery_alchemy.workers.sending.sender.BATCH", 5)
    errors: list[BaseException] = []
    written = threading.Event()

    def commit(first: int) -> None:
        for number in range(first, first + 40):
            with shop.db.unit_of_work():
                for part in range(3):
                    shop.note.delay_on_commit(number, part)

    def send() -> None:
        while True:
            is_last = written.is_set()
            if not any(outbox.send_waiting(shop.db, 5)) and is_last:
                return

    def guarded(work: Any, *args: Any) -> None:
        try:
            work(*args)
        except BaseException as error:
            errors.append(error)
            written.set()

    committing = [threading.Thread(target=guarded, args=(commit, 100 * number)) for number in range(3)]
    sending = [threading.Thread(target=guarded, args=(send,)) for _ in range(4)]
    for thread in (*committing, *sending):
        thread.start()
    for thread in committing:
        thread.join(60)
    written.set()
    for thread in sending:
        thread.join(60)
    assert errors == []
    assert shop.waiting() == []
    by_transaction: dict[int, list[int]] = {}
    for number, part in shop.arguments():
        by_transaction.setdefault(number, []).append(part)
    assert len(by_transaction) == 120
    assert set(map(tuple, by_transaction.values())) == {(0, 1, 2)}
    shop.stop()


def test_the_child_of_a_fork_has_connections_of_its_own(run_database: PostgreSQL) -> None:
    """What it does to those of its parent, the parent would see."""
    shop = Shop(run_database, broker_url=servers.rabbitmq())

    def send(what: str) -> None:
        with shop.db.unit_of_work():
            shop.note.delay_on_commit(what)

    def child() -> int:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                send("child")
                broker.close_idle(shop.app)
                status = 0
            finally:
                os._exit(status)
        return os.waitpid(pid, 0)[1]

    send("parent")
    before = broker._brokers[shop.app]._idle[0]._connection
    assert child() == 0
    send("parent again")
    assert broker._brokers[shop.app]._idle[0]._connection is before, "its connection is as it was"
    assert shop.arguments() == [["parent"], ["child"], ["parent again"]]
    assert shop.waiting() == []
    with shop.app.connection_for_write() as connection, connection.channel() as channel:
        channel.queue_delete(shop.queue)
    shop.stop()


@pytest.fixture(scope="module")
def preparing() -> Iterator[tuple[PostgreSQL, PostgreSQL]]:
    """Two databases of a PostgreSQL server that prepares transactions."""
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(PostgreSQLServer(stack.enter_context(run_directory()))).url
        except ServiceError as error:
            pytest.skip(str(error))
        yield (
            stack.enter_context(databases.new_postgresql(url, "here")),
            stack.enter_context(databases.new_postgresql(url, "there")),
        )


@pytest.mark.parametrize("uses_default", [True, False])
def test_two_phase_commit(preparing: tuple[PostgreSQL, PostgreSQL], key: str, uses_default: bool) -> None:
    """The message is prepared with the transaction that it belongs to: rolled back together, committed together."""
    here, there = preparing
    settings: dict[str, Any] = {
        "alchemy_two_phase": True,
        "alchemy_databases": {"reports": there.url("reports")},
        "alchemy_outbox": "relay",
    }
    shop = Shop(here, **settings)
    reports = shop.db.databases["reports"]

    def work(note: str) -> None:
        with shop.db.unit_of_work() as session:
            reports.session.add(Row(key=key, note=note))
            if uses_default:
                session.add(Row(key=key, note=note))
            shop.note.delay_on_commit(note)
            if note == "refused":
                # Deferred: the server says so when the transaction is prepared.
                reports.session.execute(text("SET CONSTRAINTS ALL DEFERRED"))
                reports.session.execute(text(f"INSERT INTO deferred_{key[:6]} VALUES (1), (1)"))

    there.execute(f"CREATE TABLE deferred_{key[:6]} (n INT UNIQUE DEFERRABLE)")
    with pytest.raises(Exception, match="duplicate key"):
        work("refused")
    assert here.column(f"SELECT count(*) FROM {TABLE}") == [0]
    work("committed")
    assert there.rows(key) == ["committed"]
    assert here.rows(key) == (["committed"] if uses_default else [])
    assert outbox.send_waiting(shop.db) == (1, 0)
    assert shop.arguments() == [["committed"]]
    shop.stop()
    reports.stop()
