"""The outbox: what becomes of messages when the broker, or one of them, is difficult."""

import contextlib
import datetime
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import signals
from celery.exceptions import SoftTimeLimitExceeded
from kombu import Exchange, Queue
from sqlalchemy import URL, make_url, text
from support import servers
from support.databases import PostgreSQL
from support.outbox import TABLE, Shop
from support.project.models import Row
from support.waiting import eventually
from support.worker import Site

from celery_alchemy.loadtests.services.proxy import Conversation, CountingProxy, Proxy
from celery_alchemy.strategies.features import outbox as rows
from celery_alchemy.workers.sending import broker, outbox, sender
from celery_alchemy.workers.sending.broker import Broker

RABBIT = URL.create("amqp", host="127.0.0.1", port=5672)


class ShortLived(Proxy):
    """Ends each connection to RabbitMQ after it has carried so many messages."""

    messages = 10

    def __init__(self) -> None:
        super().__init__(RABBIT)
        self._carried: dict[Conversation, int] = {}

    def heard(self, talk: Conversation, data: bytes, *, from_client: bool) -> None:
        count = self._carried[talk] = self._carried.get(talk, 0) + data.count(b"application/json")
        if count > self.messages:
            raise OSError("its life is over")


@pytest.fixture
def rabbit(run_database: PostgreSQL) -> Iterator[Shop]:
    """An app at RabbitMQ whose own connections do not wait for confirms."""
    shop = Shop(run_database, broker_url=servers.rabbitmq(), broker_transport_options={"confirm_publish": False})
    yield shop
    with shop.app.connection_for_write() as connection, connection.channel() as channel:
        channel.queue_delete(shop.queue)
    shop.stop()


@pytest.fixture
def shop(run_database: PostgreSQL) -> Iterator[Shop]:
    shop = Shop(run_database)
    yield shop
    shop.stop()


def test_connections_that_live_for_ten_messages(rabbit: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent is recorded as sent, and is not sent again with each new connection."""
    with rabbit.broker_gone(monkeypatch):
        for number in range(20):
            with rabbit.db.unit_of_work():
                for part in range(4):
                    rabbit.note.delay_on_commit(number, part)
    rabbit.make_due()
    with contextlib.closing(ShortLived()) as proxy:
        rabbit.app.conf.broker_url = servers.rabbitmq().replace(":5672", f":{proxy.port}")
        assert outbox.send_waiting(rabbit.db) == (80, 0)
        broker.close_idle(rabbit.app)
    rabbit.app.conf.broker_url = servers.rabbitmq()
    assert rabbit.waiting() == []
    assert rabbit.arguments() == [[number, part] for number in range(20) for part in range(4)]


def test_a_message_that_no_queue_takes_is_not_lost(rabbit: Shop) -> None:
    """It is unroutable, or RabbitMQ refuses it, or its exchange is not there: its own failure, and no other's."""
    full = Queue(f"{rabbit.queue}-full", queue_arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    somewhere = Exchange(f"{rabbit.queue}-exchange", type="direct")
    with rabbit.app.connection_for_write() as connection, connection.channel() as channel:
        full(channel).declare()
        somewhere(channel).declare()
        with rabbit.db.unit_of_work():
            rabbit.note.apply_async_on_commit(("fits",), exchange="", routing_key=full.name, queue=full)
            rabbit.note.apply_async_on_commit(("too much",), exchange="", routing_key=full.name, queue=full)
            rabbit.note.apply_async_on_commit(("unroutable",), exchange=somewhere.name, routing_key="nowhere")
            rabbit.note.apply_async_on_commit(("no exchange",), exchange="nowhere", routing_key="nowhere")
            rabbit.note.delay_on_commit("goes")
        assert rabbit.arguments() == [["goes"]]
        errors = rabbit.database.column(f"SELECT error FROM {TABLE} WHERE attempts = 1 ORDER BY id")
        assert [error.partition(":")[0] for error in errors] == ["MessageNacked", "Unsendable", "NotFound"]
        assert "fits" in str(channel.basic_get(full.name, no_ack=True).body)
        rabbit.make_due()
        assert outbox.send_waiting(rabbit.db) == (1, 2)  # now there is room in one of them
        channel.queue_delete(full.name)
        channel.exchange_delete(somewhere.name)


def test_a_connection_that_was_idle_for_too_long(rabbit: Shop) -> None:
    with contextlib.closing(Proxy(RABBIT)) as proxy:
        rabbit.app.conf.broker_url = servers.rabbitmq().replace(":5672", f":{proxy.port}")
        for number in range(3):
            with rabbit.db.unit_of_work():
                rabbit.note.delay_on_commit(number)
            assert proxy.cut() == 1
        broker.close_idle(rabbit.app)
    rabbit.app.conf.broker_url = servers.rabbitmq()
    assert rabbit.arguments() == [[0], [1], [2]]
    assert rabbit.waiting() == []


@pytest.mark.parametrize("how", ["outbox", "on_commit"])
def test_a_stalled_broker_holds_no_database_connection(
    run_database: PostgreSQL, key: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Fifteen threads wait for it; the connection pool has three connections, and requests go on."""
    name = f"stalled-{how}"
    monkeypatch.setattr(broker, "TIMEOUT_S", 60.0)
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:
        shop = Shop(
            run_database,
            run_database.url(name),
            broker_url=f"amqp://guest:guest@127.0.0.1:{listener.getsockname()[1]}//",
            alchemy_outbox=how == "outbox",
            alchemy_engine_options={"pool_size": 3, "max_overflow": 0, "pool_timeout": 5},
            broker_connection_timeout=60,
            broker_connection_retry=False,
        )
        committed, released = threading.Barrier(16), threading.Event()

        def stalled() -> None:
            """What a callback of a user's does that talks to a broker."""
            committed.wait(30)
            released.wait(60)

        def commit() -> None:
            with shop.db.unit_of_work() as session:
                session.add(Row(key=key))
                session.flush()
                if how == "outbox":
                    shop.note.delay_on_commit(1)
                else:
                    shop.db.on_commit(stalled)

        threads = [threading.Thread(target=commit, daemon=True) for _ in range(15)]
        for thread in threads:
            thread.start()
        if how == "on_commit":
            committed.wait(30)
        eventually(lambda: len(run_database.rows(key)) == 15, "all are committed")
        assert all(thread.is_alive() for thread in threads), "they wait for the broker"
        eventually(lambda: run_database.busy(name) == [], "no connection is in a transaction")
        with shop.db.unit_of_work() as session:  # another request
            assert session.scalar(text("SELECT 1")) == 1
        released.set()
        accepted = []
        listener.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while any(thread.is_alive() for thread in threads):
                accepted.append(listener.accept()[0])
                accepted[-1].close()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    shop.stop()


def test_a_time_limit_while_sending(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is nobody's failure: what was sent is recorded, the rest is due at once, and the limit strikes."""
    original = Broker.publish

    def publish(self: Broker, publication: Any) -> None:
        if b"second" in publication.body:
            raise SoftTimeLimitExceeded
        original(self, publication)

    with monkeypatch.context() as patch:
        patch.setattr(Broker, "publish", publish)
        with pytest.raises(SoftTimeLimitExceeded), shop.db.unit_of_work():
            for what in ("first", "second", "third"):
                shop.note.delay_on_commit(what)
    assert shop.arguments() == [["first"]]
    assert shop.database.column(f"SELECT attempts FROM {TABLE}") == [0, 0]
    assert outbox.send_waiting(shop.db) == (2, 0)
    assert shop.arguments() == [["second"], ["third"]]


def test_times_are_those_of_the_call(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a message waits: `countdown` and `expires` do not begin anew."""
    before = datetime.datetime.now(datetime.UTC)
    with shop.broker_gone(monkeypatch), shop.db.unit_of_work():
        shop.note.apply_async_on_commit((1,), countdown=100, expires=200)
    after = datetime.datetime.now(datetime.UTC)
    later = time.time() + 50
    with monkeypatch.context() as patch:
        patch.setattr("celery_alchemy.workers.sending.publication.time.time", lambda: later)
        shop.make_due()
        assert outbox.send_waiting(shop.db) == (1, 0)
    (message,) = shop.messages()
    for name, seconds in (("eta", 100), ("expires", 200)):
        moment = datetime.datetime.fromisoformat(message.headers[name]) - datetime.timedelta(seconds=seconds)
        assert before <= moment <= after
    assert 100_000 < int(message.properties["expiration"]) <= 150_000


def test_what_has_expired_is_not_sent_but_counted(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with shop.broker_gone(monkeypatch), shop.db.unit_of_work():
        shop.note.apply_async_on_commit((1,), expires=60)
        shop.note.delay_on_commit(2)
    later = time.time() + 61
    counted = sender.tally.expired
    monkeypatch.setattr("celery_alchemy.workers.sending.publication.time.time", lambda: later)
    shop.make_due()
    with caplog.at_level(logging.INFO):
        assert outbox.send_waiting(shop.db) == (1, 0)
    assert sender.tally.expired == counted + 1
    assert "has expired in the outbox, and is not sent" in caplog.text
    assert shop.arguments() == [[2]]
    assert shop.waiting() == []


def test_routes_priorities_and_headers_are_as_given(run_database: PostgreSQL) -> None:
    queue = f"routed-{uuid.uuid4().hex}"
    shop = Shop(
        run_database,
        broker_url=servers.rabbitmq(),
        task_routes={"note": {"queue": queue}},
        event_exchange=f"{queue}-events",
        task_compression="gzip",
        task_send_sent_event=True,
    )
    published: list[Any] = []
    events: list[Any] = []

    def listen(sender: Any, headers: Any, body: Any, **_: Any) -> None:
        published.append((sender, headers["id"], body[0], shop.waiting()))

    def add_header(headers: Any, **_: Any) -> None:
        headers["traced"] = f"{len(published)} published"

    signals.after_task_publish.connect(listen)
    signals.before_task_publish.connect(add_header)
    with shop.app.connection_for_read() as connection:
        receiver = shop.app.events.Receiver(connection, handlers={"task-sent": events.append})
        with receiver.consumer_context():
            with shop.db.unit_of_work():
                result = shop.note.apply_async_on_commit((1,), priority=7, headers={"tenant": "x"}, shadow="s")
                assert published == []
            deadline = time.monotonic() + 30
            while not events and time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    connection.drain_events(timeout=0.5)
    signals.after_task_publish.disconnect(listen)
    signals.before_task_publish.disconnect(add_header)
    assert published == [("note", result.id, (1,), [[result.id]])], "told when sent, before the row is deleted"
    assert [(sent["uuid"], sent["name"], sent["queue"]) for sent in events] == [(result.id, "note", queue)]
    (message,) = shop.messages(queue)
    assert message.properties["priority"] == 7
    assert message.headers["tenant"] == "x"
    assert message.headers["shadow"] == "s"
    assert message.headers["traced"] == "0 published"
    assert message.headers["compression"] == "application/x-gzip"
    assert message.decode()[0] == [1]
    with shop.app.connection_for_write() as connection, connection.channel() as channel:
        channel.queue_delete(queue)
        channel.exchange_delete(f"{queue}-events")
    shop.stop()


def test_a_relay_leaves_the_broker_alone(run_database: PostgreSQL, key: str) -> None:
    """With `alchemy_outbox = "relay"` a process that commits does not even connect to it."""
    shop = Shop(run_database, broker_url="amqp://127.0.0.1:1//", alchemy_outbox="relay")
    with shop.db.unit_of_work() as session:
        session.add(Row(key=key))
        shop.note.delay_on_commit(1)
    assert len(shop.waiting()) == 1
    with shop.db.unit_of_work() as session:
        assert len(rows.claim(session, rows.chosen_table())) == 1, "it is due at once"
    shop.stop()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sender_is_woken_and_ends_well(
    tmp_path: Path, run_database: PostgreSQL, site: Site, key: str, driver: str, number: int
) -> None:
    """Long before its interval is over; it listens on a connection of its own."""
    queue = f"{site.prefix}{key}"
    shop = Shop(
        run_database, broker_url=site.urls.celery, alchemy_outbox="relay", task_default_queue=queue,
        broker_transport_options={"global_keyprefix": ""},
    )  # fmt: skip
    (tmp_path / "shop.py").write_text(
        f"""
from celery import Celery
from celery_alchemy import Alchemy, outbox_table
app = Celery("shop", broker={site.urls.celery!r})
app.conf.update(alchemy_database_url={run_database.url(f"relay-{number}", driver)!r}, alchemy_outbox="relay",
                task_default_queue={queue!r}, broker_transport_options={{"global_keyprefix": ""}})
db = Alchemy(app)
"""
    )
    command = [sys.executable, "-m", "celery", "-A", "shop", "alchemy", "outbox", "run", "--interval-s", "600"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    listening = (
        f"SELECT count(*) FROM pg_stat_activity WHERE application_name = 'relay-{number}' AND query LIKE 'LISTEN%'"
    )
    eventually(lambda: run_database.column(listening) == [1], "it listens")
    with shop.db.unit_of_work() as session:
        session.add(Row(key=key))
        shop.note.delay_on_commit("woken")
    (message,) = eventually(lambda: site.redis.lrange(queue, 0, -1), "it is sent", within_s=60)
    assert json.loads(message)["headers"]["argsrepr"] == "('woken',)"
    eventually(lambda: shop.waiting() == [], "it is recorded")
    process.send_signal(number)
    assert process.wait(60) == 0, process.stdout
    process.communicate()
    shop.stop()


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_round_trips_of_one_message(request: pytest.FixtureRequest, driver: str) -> None:
    """The rows of docs/round-trips.md. Waiting for the database: an INSERT, and one message."""
    database: Any = request.getfixturevalue("run_database" if driver == "psycopg" else "mariadb")
    expected = {
        # BEGIN, INSERT, COMMIT; MariaDB's transactions begin with the first statement.
        False: {"psycopg": 3, "pymysql": 2},
        # The row of the message.
        "relay": {"psycopg": 4, "pymysql": 3},
        # And after the COMMIT BEGIN, DELETE, COMMIT.
        True: {"psycopg": 7, "pymysql": 5},
    }
    with CountingProxy(make_url(database.url("counted"))) as proxy:
        for how, answers in expected.items():
            url = proxy.url.render_as_string(hide_password=False)
            shop = Shop(database, url, alchemy_outbox=how, alchemy_begin_with_first_statement=False)
            counted = []
            for number in range(12):  # psycopg prepares a statement, in a round trip of its own, the sixth time
                before = proxy.round_trips
                with shop.db.unit_of_work() as session:
                    session.add(Row(key="counted"))
                    shop.note.delay_on_commit(number)
                counted.append(proxy.round_trips - before)
            assert counted[-1] == answers[driver], (how, counted)
            assert len(shop.arguments()) == (0 if how == "relay" else 12)
            shop.stop()
            database.execute(f"DELETE FROM {TABLE}")
