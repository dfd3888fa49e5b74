"""The outbox: messages are written by the transaction that they belong to, and sent at least once, in their order."""

import contextlib
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, group
from kombu.exceptions import OperationalError
from sqlalchemy.orm import Session
from support import databases, forking, servers
from support.databases import Database, PostgreSQL
from support.faults import SEED, amount
from support.project.models import Row
from support.waiting import eventually
from support.worker import Site

from celery_alchemy import Alchemy, CeleryAlchemyError, DatabaseTask
from celery_alchemy.strategies.features.outbox import send_some
from celery_alchemy.workers.sending import outbox

KILLS = amount(80, 1000)


@pytest.fixture(scope="module")
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_outbox") as database:
        yield database


class Shop:
    """An app with an outbox, and what has been sent through its broker."""

    def __init__(self, database: Database, **settings: Any) -> None:
        self.database = database
        self.app = Celery("outbox", broker="memory://", set_as_current=False)
        self.app.conf.update(
            alchemy_database_url=database.url("outbox"),
            alchemy_outbox=True,
            task_default_queue=uuid.uuid4().hex,
            **settings,
        )
        self.db = Alchemy(self.app)
        database.execute("DELETE FROM celery_alchemy_outbox")

        @self.app.task(base=DatabaseTask, bind=True, shared=False, name="note")
        def note(task: Any, *args: Any, **kwargs: Any) -> None:
            pass

        self.note = note

    def sent(self) -> list[Any]:
        """Return what has arrived since the last look: id, arguments, headers."""
        found = []
        name = self.app.conf.task_default_queue
        with self.app.connection_for_read() as connection, connection.SimpleQueue(name) as queue:
            while True:
                try:
                    message = queue.get(block=False)
                except queue.Empty:
                    return found
                message.ack()
                found.append((message.headers["id"], message.decode()[0], message.headers))

    def count(self) -> int:
        """Return how many messages are in the queue."""
        with self.app.connection_for_read() as connection:
            return int(connection.default_channel.queue_declare(self.app.conf.task_default_queue).message_count)

    def arguments(self) -> list[Any]:
        return [arguments for _, arguments, _ in self.sent()]

    def waiting(self) -> list[list[str]]:
        """Return the ids of the messages that wait, by row."""
        rows = self.database.column("SELECT messages FROM celery_alchemy_outbox ORDER BY id")
        return [[message["options"]["task_id"] for message in json.loads(row)] for row in rows]

    @contextlib.contextmanager
    def broker_gone(self, monkeypatch: pytest.MonkeyPatch, refused: str = "") -> Iterator[None]:
        """Let nothing be sent, or only what has not `refused` as its argument."""
        original = self.app.amqp.send_task_message

        def send(producer: Any, name: str, message: Any, **options: Any) -> Any:
            if not refused:
                raise OperationalError("the broker is gone")
            if refused in str(message.body):
                raise ValueError("this one cannot be sent")
            return original(producer, name, message, **options)

        with monkeypatch.context() as patch:
            patch.setattr(self.app.amqp, "send_task_message", send)
            yield


@pytest.fixture(params=["postgresql", "mariadb"])
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    name = "run_database" if request.param == "postgresql" else "mariadb"
    shop = Shop(request.getfixturevalue(name))
    yield shop
    shop.db.stop()
    shop.app.close()


def test_it_is_sent_after_the_commit_and_the_outbox_is_empty(shop: Shop, key: str) -> None:
    with shop.db.unit_of_work() as session:
        session.add(Row(key=key))
        results = [shop.note.delay_on_commit(number) for number in range(5)]
        assert shop.sent() == []
        assert shop.waiting() == []
    assert [task_id for task_id, _, _ in shop.sent()] == [result.id for result in results]
    assert shop.waiting() == []


def test_what_is_rolled_back_was_never_there(shop: Shop) -> None:
    with contextlib.suppress(ZeroDivisionError), shop.db.unit_of_work():
        shop.note.delay_on_commit(1)
        raise ZeroDivisionError
    with shop.db.unit_of_work() as session:
        shop.note.delay_on_commit("before")
        with contextlib.suppress(ZeroDivisionError), session.begin_nested():
            shop.note.delay_on_commit("undone")
            raise ZeroDivisionError
        with session.begin_nested():
            shop.note.delay_on_commit("kept")
        session.rollback()
        with session.begin_nested():
            shop.note.delay_on_commit("second transaction")
    assert shop.arguments() == [["second transaction"]]
    assert shop.waiting() == []


def test_each_commit_sends_its_own(shop: Shop) -> None:
    with shop.db.unit_of_work() as session:
        shop.note.delay_on_commit(1)
        session.commit()
        assert shop.arguments() == [[1]]
        shop.note.delay_on_commit(2)
        shop.note.delay_on_commit(3)
    assert shop.arguments() == [[2], [3]]


def test_a_broker_that_is_gone_loses_nothing(shop: Shop, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    with shop.broker_gone(monkeypatch), shop.db.unit_of_work() as session:
        session.add(Row(key=key))
        results = [shop.note.delay_on_commit(number) for number in range(3)]
    assert shop.database.rows(key) == [""]
    assert shop.waiting() == [[result.id for result in results]]
    with shop.broker_gone(monkeypatch), pytest.raises(OperationalError):
        outbox.send_waiting(shop.db)
    assert len(shop.waiting()) == 1
    assert outbox.send_waiting(shop.db) == (1, 0)
    assert shop.arguments() == [[0], [1], [2]]
    assert shop.waiting() == []


def test_one_that_cannot_be_sent_holds_up_no_other(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    with shop.broker_gone(monkeypatch):
        for what in ("first", "poison", "last"):
            with shop.db.unit_of_work():
                shop.note.delay_on_commit(what)
    with shop.broker_gone(monkeypatch, refused="poison"):
        assert outbox.send_waiting(shop.db) == (2, 1)
        assert outbox.send_waiting(shop.db) == (0, 1)
    assert shop.arguments() == [["first"], ["last"]]
    assert outbox.send_waiting(shop.db) == (1, 0)
    assert shop.arguments() == [["poison"]]


def test_who_sends_also_sends_what_others_left(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    with shop.broker_gone(monkeypatch), shop.db.unit_of_work():
        shop.note.delay_on_commit("left")
    monkeypatch.setattr(outbox, "_last_look", 0.0)
    with shop.db.unit_of_work():
        shop.note.delay_on_commit("own")
    assert shop.arguments() == [["own"], ["left"]]


def test_what_somebody_else_is_sending_is_left_out(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    with shop.broker_gone(monkeypatch):
        for what in ("theirs", "ours"):
            with shop.db.unit_of_work():
                shop.note.delay_on_commit(what)
    with shop.db.unit_of_work() as session:
        sending = send_some(session, 1, lambda messages: None)
        next(sending)  # it holds the lock of the first
        assert outbox.send_waiting(shop.db) == (1, 0)
        sending.close()
        session.rollback()
    assert shop.arguments() == [["ours"]]
    assert outbox.send_waiting(shop.db) == (1, 0)


def test_the_message_is_the_one_that_was_asked_for(shop: Shop) -> None:
    mutable = ["now"]
    with shop.db.unit_of_work():
        link = shop.note.si("linked").set(queue="elsewhere")
        result = shop.note.apply_async_on_commit(
            (mutable,), {"by": "name"}, countdown=60, headers={"mine": "yes"}, link=link, priority=3, expires=3600
        )
        mutable.append("later")
        group(shop.note.si("one"), shop.note.si("two")).apply_async(enqueue_on_commit=True)
    (task_id, body, headers), *rest = shop.sent()
    assert (task_id, body) == (result.id, [["now"]])
    assert headers["eta"]
    assert headers["expires"]
    assert headers["mine"] == "yes"
    assert len(rest) == 2


def test_binary_serializers(shop: Shop) -> None:
    with shop.db.unit_of_work():
        shop.note.apply_async_on_commit(({1, 2},), serializer="pickle")
        assert shop.count() == 0
    assert shop.count() == 1


def test_an_option_that_cannot_be_written_down_says_so(shop: Shop) -> None:
    with shop.db.unit_of_work(), pytest.raises(CeleryAlchemyError, match="note cannot be put into the outbox"):
        shop.note.apply_async_on_commit((1,), headers={"mine": object()})


def test_a_session_of_the_web_application(shop: Shop, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    with Session(shop.db.engine) as session:
        session.add(Row(key=key))
        shop.note.apply_async_on_commit((1,), session=session)
        with shop.broker_gone(monkeypatch):
            session.commit()
        shop.note.apply_async_on_commit((2,), session=session)
        session.rollback()
    assert len(shop.waiting()) == 1
    assert outbox.send_waiting(shop.db) == (1, 0)
    assert shop.arguments() == [[1]]


def test_without_a_transaction_to_belong_to(shop: Shop) -> None:
    shop.note.delay_on_commit("outside")
    with shop.db.unit_of_work(read_only=True):
        shop.note.delay_on_commit("reading")
    assert shop.arguments() == [["outside"], ["reading"]]


@pytest.mark.parametrize("serve", ["once", "until it is told to stop"])
def test_the_command(tmp_path: Path, run_database: PostgreSQL, site: Site, key: str, serve: str) -> None:
    """`celery alchemy outbox run` sends what a process that was killed has left."""
    queue = f"{site.prefix}{key}"
    (tmp_path / "shop.py").write_text(
        f"""
from celery import Celery
from celery_alchemy import Alchemy, DatabaseTask
app = Celery("shop", broker={site.urls.celery!r})
app.conf.update(alchemy_database_url={run_database.url("outbox")!r}, alchemy_outbox=True,
                task_default_queue={queue!r}, broker_transport_options={{"global_keyprefix": ""}})
db = Alchemy(app)

@app.task(base=DatabaseTask, name="note")
def note(what): pass

if __name__ == "__main__":
    import os
    from celery_alchemy.workers.sending import outbox
    outbox.Delivery.__call__ = lambda self: os._exit(0)  # killed right after the COMMIT
    with db.unit_of_work():
        note.delay_on_commit("left")
"""
    )
    run_database.execute("DELETE FROM celery_alchemy_outbox")
    subprocess.run([sys.executable, "shop.py"], cwd=tmp_path, check=True, timeout=30)
    assert run_database.column("SELECT count(*) FROM celery_alchemy_outbox") == [1]
    command = [sys.executable, "-m", "celery", "-A", "shop", "alchemy", "outbox", "run", "--interval-s", "0.1"]
    if serve == "once":
        done = subprocess.run(
            [*command, "--once"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30
        )
        assert (done.returncode, done.stdout) == (0, "sent 1 rows of the outbox\n"), done.stderr
    else:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        count = "SELECT count(*) FROM celery_alchemy_outbox"
        eventually(lambda: run_database.column(count) == [0], "it is sent")
        process.terminate()
        assert process.wait(10) == 0
    (message,) = site.redis.lrange(queue, 0, -1)
    assert json.loads(message)["headers"]["task"] == "note"


@pytest.mark.timeout(amount(120, 1200))
@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_killed_anywhere(request: pytest.FixtureRequest, site: Site, tmp_path: Path, key: str, driver: str) -> None:
    """SIGKILL of who commits and of who sends, at any moment: every message of a committed transaction arrives, in its
    order, and none of another."""
    database: Database = request.getfixturevalue("run_database" if driver == "psycopg" else "mariadb")
    queue = f"{site.prefix}{key}"
    database.execute("DELETE FROM celery_alchemy_outbox")
    settings = {"url": database.url("outbox"), "broker": site.urls.celery, "queue": queue}
    with forking.script("outbox_host", tmp_path / "host.log", **settings) as script:
        answer = script.ask(within_s=amount(100, 1100), key=key, count=KILLS, seed=SEED)
    print(f"CELERY_ALCHEMY_SEED={SEED}", answer)
    committed = set(map(int, database.rows(key)))
    headers = [json.loads(message)["headers"] for message in reversed(site.redis.lrange(queue, 0, -1))]
    arrived = [tuple(header["argsrepr"].strip("(),").split(", ")) for header in headers]
    by_transaction: dict[int, list[str]] = {}
    for transaction, part in arrived:
        by_transaction.setdefault(int(transaction), []).append(part)
    del by_transaction[-1]  # to see how long one takes
    assert by_transaction.keys() == committed
    for transaction, parts in by_transaction.items():
        firsts = [parts.index(part) for part in ("1", "2", "3")]
        assert firsts == sorted(firsts), (transaction, parts)
    assert answer["killed"] > KILLS / 5, "too few were killed to show anything"
    assert 0 < len(committed) < KILLS
    assert database.column("SELECT count(*) FROM celery_alchemy_outbox") == [0]
