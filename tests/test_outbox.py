"""The outbox: messages are written by the transaction that they belong to, and sent at least once, in their order."""

import contextlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import group
from kombu.exceptions import OperationalError
from sqlalchemy import make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from support import databases, forking, preloaded
from support.databases import Database, PostgreSQL
from support.faults import SEED, amount
from support.outbox import TABLE, Shop
from support.project.models import Base, Row
from support.waiting import eventually
from support.worker import Site

from celery_alchemy import CeleryAlchemyError, ConfigurationError, DatabaseTask
from celery_alchemy.strategies.features import outbox as rows
from celery_alchemy.strategies.features.outbox_table import database_now
from celery_alchemy.workers.sending import outbox

KILLS = amount(80, 1000)


@pytest.fixture(params=["postgresql", "mariadb"])
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    name = "run_database" if request.param == "postgresql" else "mariadb"
    shop = Shop(request.getfixturevalue(name))
    yield shop
    shop.stop()


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
    assert outbox.send_waiting(shop.db) == (3, 0)
    assert shop.arguments() == [[0], [1], [2]]
    assert shop.waiting() == []


def test_one_that_cannot_be_sent_holds_up_no_other(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own transaction neither: those are not sent again with each of its attempts."""
    with shop.broker_gone(monkeypatch), shop.db.unit_of_work():
        for what in ("first", "poison", "last"):
            shop.note.delay_on_commit(what)
    with shop.broker_gone(monkeypatch, refused="poison"):
        assert outbox.send_waiting(shop.db) == (2, 1)
        for _ in range(10):
            shop.make_due()
            outbox.send_waiting(shop.db)
    assert shop.arguments() == [["first"], ["last"]]
    assert shop.database.column(f"SELECT attempts FROM {TABLE} WHERE due_at IS NULL") == [10]
    assert "this one cannot be sent" in shop.database.column(f"SELECT error FROM {TABLE}")[0]
    shop.make_due()
    assert outbox.send_waiting(shop.db) == (0, 0)  # set aside: nobody sends it before it is told to
    with shop.db.unit_of_work() as session:
        assert rows.retry(session, rows.chosen_table(), []) == 1
    assert outbox.send_waiting(shop.db) == (1, 0)
    assert shop.arguments() == [["poison"]]


def test_pauses_grow(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    with shop.broker_gone(monkeypatch), shop.db.unit_of_work():
        shop.note.delay_on_commit("poison")
    pauses = []
    with shop.broker_gone(monkeypatch, refused="poison"):
        for _ in range(9):
            shop.make_due()
            assert outbox.send_waiting(shop.db) == (0, 1)
            with shop.db.unit_of_work() as session:
                (pause,) = session.scalars(select(rows.chosen_table().c.due_at - database_now()))
            pauses.append(pause)
    for pause, expected in zip(pauses, [5, 10, 20, 40, 80, 160, 320, 600, 600], strict=True):
        assert expected / 2 < pause <= expected


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
        (theirs,) = rows.claim(session, rows.chosen_table(), 1)  # and it holds the lock
        assert outbox.send_waiting(shop.db) == (1, 0)
    assert shop.arguments() == [["ours"]]
    assert outbox.send_waiting(shop.db) == (0, 0)  # the lock is gone, the lease is not
    with shop.db.unit_of_work() as session:
        rows.record(session, rows.chosen_table(), rows.Record(again=[theirs.id]))
    assert outbox.send_waiting(shop.db) == (1, 0)
    assert shop.arguments() == [["theirs"]]


def test_a_transaction_is_sent_by_one(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two senders would let its messages overtake one another."""
    with shop.broker_gone(monkeypatch), shop.db.unit_of_work():
        for number in range(5):
            shop.note.delay_on_commit(number)
    table = rows.chosen_table()
    with shop.db.unit_of_work() as session:
        claimed = rows.claim(session, table, 1)
        assert [row.position for row in claimed] == [0, 1, 2, 3, 4]
        rows.record(session, table, rows.Record(again=[row.id for row in claimed[3:]]))
    with shop.db.unit_of_work() as session:
        assert rows.claim(session, table) == []


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
    """They are sent as the bytes that they are; what the app's own workers would refuse is refused at the call."""
    with (
        shop.db.unit_of_work(),
        pytest.raises(CeleryAlchemyError, match="'application/x-python-serialize'"),
    ):
        shop.note.apply_async_on_commit(({1, 2},), serializer="pickle")
    shop.app.conf.accept_content = ["json", "pickle"]
    with shop.db.unit_of_work():
        shop.note.apply_async_on_commit(({1, 2},), serializer="pickle")
        assert shop.messages() == []
    (message,) = shop.messages()
    assert message.content_type == "application/x-python-serialize"
    assert pickle.loads(message.body)[0] == ({1, 2},)


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
    from celery_alchemy.strategies.features import outbox as rows
    rows.LEASE_S = 0.1
    outbox.Delivery.__call__ = lambda self: os._exit(0)  # killed right after the COMMIT
    with db.unit_of_work():
        note.delay_on_commit("left")
"""
    )
    run_database.execute("DELETE FROM celery_alchemy_outbox")
    assert preloaded.run([sys.executable, "shop.py"], cwd=tmp_path, env=os.environ, timeout=250).returncode == 0
    assert run_database.column("SELECT count(*) FROM celery_alchemy_outbox") == [1]
    command = [sys.executable, "-m", "celery", "-A", "shop", "alchemy", "outbox", "run", "--interval-s", "0.1"]
    if serve == "once":
        done = preloaded.run([*command, "--once"], cwd=tmp_path, env=os.environ, timeout=250)
        assert (done.returncode, done.stdout) == (0, "sent 1 message of the outbox\n"), done.stderr
    else:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        count = "SELECT count(*) FROM celery_alchemy_outbox"
        eventually(lambda: run_database.column(count) == [0], "it is sent")
        process.terminate()
        assert process.wait(60) == 0
    (message,) = site.redis.lrange(queue, 0, -1)
    assert json.loads(message)["headers"]["task"] == "note"


@pytest.mark.timeout(amount(320, 1200))
@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_killed_anywhere(request: pytest.FixtureRequest, site: Site, tmp_path: Path, key: str, driver: str) -> None:
    """SIGKILL of who commits and of who sends, at any moment: every message of a committed transaction arrives, in its
    order, and none of another."""
    database: Database = request.getfixturevalue("run_database" if driver == "psycopg" else "mariadb")
    queue = f"{site.prefix}{key}"
    database.execute("DELETE FROM celery_alchemy_outbox")
    settings = {"url": database.url("outbox"), "broker": site.urls.celery, "queue": queue}
    with forking.script("outbox_host", tmp_path / "host.log", **settings) as script:
        answer = script.ask(within_s=amount(300, 1100), key=key, count=KILLS, seed=SEED)
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


# -- without its table -----------------------------------------------------------------------------------------------

NO_TABLE = "alchemy_outbox is on, but the database has no table 'celery_alchemy_outbox'.*outbox_table"


@pytest.fixture(params=["postgresql", "mariadb", "sqlite"])
def shop_without_a_table(request: pytest.FixtureRequest, run_database: PostgreSQL, tmp_path: Path) -> Iterator[Shop]:
    """An app whose database has no outbox; the table is away for the time of the test."""
    if request.param == "sqlite":
        database: Database = databases.SQLite(make_url(f"sqlite:///{tmp_path}/shop.db"))
        Base.metadata.create_all(database.engine)
    else:
        database = run_database if request.param == "postgresql" else request.getfixturevalue("mariadb")
    shop = Shop(database)
    database.execute("ALTER TABLE celery_alchemy_outbox RENAME TO away")
    yield shop
    shop.db.stop()
    database.execute("ALTER TABLE away RENAME TO celery_alchemy_outbox")


def test_a_task_that_sends_says_that_the_table_is_missing(shop_without_a_table: Shop, key: str) -> None:
    shop = shop_without_a_table

    @shop.app.task(base=DatabaseTask, bind=True, shared=False, name="sends")
    def sends(task: Any) -> None:
        task.db.add(Row(key=key, note="written"))
        shop.note.delay_on_commit(1)

    with pytest.raises(ConfigurationError, match=NO_TABLE):
        sends.apply(throw=True)
    with pytest.raises(ConfigurationError, match=NO_TABLE):
        outbox.send_waiting(shop.db)
    assert shop.sent() == []
    assert shop.database.column("SELECT note FROM rows_ WHERE key_ = :key", key=key) == []


def test_another_missing_table_is_not_blamed_on_the_outbox(shop_without_a_table: Shop) -> None:
    with pytest.raises(DBAPIError), shop_without_a_table.db.unit_of_work() as session:
        session.execute(text("SELECT * FROM nowhere"))


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ("", "nothing in this process declares its table 'celery_alchemy_outbox'"),
        (
            "app.conf.alchemy_outbox_table = 'shop.messages'",
            "nothing in this process declares its table 'shop.messages'",
        ),
        (
            "app.conf.alchemy_outbox_table = 'shop.messages'; kept = outbox_table(MetaData())",
            "declares 'celery_alchemy_outbox' instead of 'shop.messages'",
        ),
        ("kept = outbox_table(MetaData(schema='shop'))", None),
        ("kept = outbox_table(MetaData(), name='messages')", None),
        ("kept = outbox_table(MetaData())", None),
        (
            "kept = outbox_table(MetaData()), outbox_table(MetaData(schema='shop'))",
            "declares 2 tables for it: celery_alchemy_outbox, shop.celery_alchemy_outbox. Name the one to use: "
            "alchemy_outbox_table = 'celery_alchemy_outbox'",
        ),
    ],
)
def test_a_worker_says_that_no_table_is_declared(tmp_path: Path, declared: str, says: str | None) -> None:
    """It connects to nothing when it starts: it can only tell what its code declares."""
    script = tmp_path / "start.py"
    script.write_text(
        "import logging, sys\n"
        "from celery import Celery\nfrom sqlalchemy import MetaData\n"
        "from celery_alchemy import Alchemy, DatabaseTask, outbox_table\n"
        "logging.basicConfig(stream=sys.stdout)\n"
        "app = Celery('shop', broker='memory://')\n"
        "app.conf.update(alchemy_database_url='postgresql+psycopg://127.0.0.1:1/shop', alchemy_outbox=True)\n"
        f"db = Alchemy(app)\n{declared}\n"
        "app.WorkController(pool_cls='solo')\n"
    )
    done = preloaded.run([sys.executable, str(script)], cwd=tmp_path, env=os.environ, timeout=250)
    if says is None:
        assert "alchemy_outbox" not in done.stdout
    else:
        assert says in done.stdout + done.stderr
        assert bool(done.returncode) == ("2 tables" in says), "the worker does not start where it is not clear which"
