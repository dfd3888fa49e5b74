"""What somebody can do who may write to the outbox's table, and nothing else: send messages that the app accepts."""

import base64
import json
import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.outbox import TABLE, Shop

from celery_alchemy import DatabaseTask
from celery_alchemy.strategies.features.completed import Key
from celery_alchemy.strategies.features.completed_table import recorded_id
from celery_alchemy.workers.sending import outbox, received

RUN: list[str] = []


class Bomb:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return RUN.append, ("code was run",)


PICKLED = base64.b64encode(pickle.dumps(Bomb())).decode()


def message(body: Any = None, **changed: Any) -> dict[str, Any]:
    """Return a message that is as it should be, but for what is `changed`."""
    body = json.dumps([["theirs"], {}, {}]).encode() if body is None else body
    return {
        "body": base64.b64encode(body).decode() if isinstance(body, bytes) else body,
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "headers": {"lang": "py", "task": "note", "id": "theirs"},
        "properties": {"correlation_id": "theirs"},
        "exchange": "",
        "routing_key": "QUEUE",
        "priority": 0,
        "delivery_mode": 2,
        "queues": [],
        **changed,
    }


#: What they write, and whether it is sent: a message like any other that the app may send.
ROWS: dict[str, tuple[Any, bool]] = {
    "a message": (message(), True),
    "pickle": (message(pickle.dumps(Bomb()), content_type="application/x-python-serialize"), False),
    "pickle, called JSON": (message(pickle.dumps(Bomb())), True),  # bytes; a worker's JSON decoder refuses them
    "pickle in the headers": (message(headers={"id": "x", "p": {"__celery_alchemy__": ["bytes", PICKLED]}}), True),
    "a class in the headers": (message(headers={"id": "x", "c": {"__type__": "os.system", "__value__": "id"}}), True),
    "a tag nobody knows": (message(headers={"id": "x", "c": {"__celery_alchemy__": ["eval", "1"]}}), True),
    "a tag that cannot be read": (message(headers={"c": {"__celery_alchemy__": ["decimal", "x"]}}), False),
    "yaml": (message(b"!!python/object/apply:os.system [id]", content_type="application/x-yaml"), False),
    "an unknown serializer": (message(content_type="application/x-unknown"), False),
    "raw bytes, trusted by kombu": (message(content_type="application/data", content_encoding="binary"), False),
    "a serializer by name": ({**message(), "serializer": "pickle"}, False),
    "an option of publish": (message(properties={"retry_policy": 1}), False),
    "another option of publish": (message(properties={"exchange": "x"}), False),
    "compression by name": ({**message(), "compression": "zlib"}, False),
    "properties that are a list": (message(properties=[1]), False),
    "properties in properties": (message(properties={"reply_to": {"a": 1}}), False),
    "a huge body": (message(b"x" * 17_000_000), False),
    "a large body": (message(b"x" * 1_000_000), True),
    "deep JSON": ("[" * 100_000, False),
    "broken JSON": ('{"body": ', False),
    "no JSON": ("\x01\x02", False),
    "empty": ("", False),
    "null": ("null", False),
    "a list": ("[1, 2]", False),
    "a number": ("1", False),
    "NaN": ('{"body": NaN}', False),
    "a huge number": (message(priority=10**400), False),
    "columns missing": ({"body": "eA=="}, False),
    "a body that is no base64": (message("%%%"), False),
    "a body that is a number": (message(7), False),
    "a task that does not exist": (message(headers={"task": "os.system", "id": "x"}), True),
    "headers that are no dict": (message(headers="text"), False),
    "a name with a NUL": ({**message(), "a\0b": 1}, False),
    "a name that is half a character": ({**message(), "\ud800": 1}, False),
    "headers that are a list": (message(headers=[["id", "x"]]), False),
    "no headers": (message(headers={}), True),
    "an exchange of another app": (message(exchange="of-another-app"), True),
    "an exchange that is no string": (message(exchange={"name": "x", "type": "fanout"}), False),
    "a routing key that is too long": (message(routing_key="x" * 300), False),
    "a reply_to": (message(properties={"reply_to": "their-queue"}), True),
    "a queue to declare": (message(queues=["a-queue-of-theirs"]), True),
    "a queue with arguments": (message(queues=[{"name": "x", "bindings": []}]), False),
    "a negative priority": (message(priority=-1), False),
    "a priority that is text": (message(priority="9"), False),
    "a delivery mode": (message(delivery_mode=77), False),
    "an encoding that is a codec": (message(content_encoding="zlib_codec"), True),
}
COLUMNS: dict[str, dict[str, Any]] = {
    "a negative id": {"id": -5},
    "a batch of somebody else": {"batch": "", "position": -7},
    "no task id": {"task_id": "", "task": ""},
    "text that is no name": {"task": "%s\n{}", "task_id": "'; DROP TABLE rows_; --"},
    "attempts without end": {"attempts": 2**31 - 2},
    "fewer than no attempts": {"attempts": -(2**31)},
    "expired since ever": {"expires_at": -1e300},
    "never expires": {"expires_at": 1e300},
    "due since ever": {"due_at": -1e300},
    "due never": {"due_at": 1e300},
    "set aside": {"due_at": None},
    "of the future": {"created_at": 1e300},
}


@pytest.fixture(params=["postgresql", "mariadb"])
def shop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setattr(outbox, "_last_look", float("inf"))  # what is theirs, `send_all` sends
    name = "run_database" if request.param == "postgresql" else "mariadb"
    shop = Shop(request.getfixturevalue(name))
    yield shop
    shop.stop()


def send_all(shop: Shop) -> int:
    sent = 0
    while any(done := outbox.send_waiting(shop.db)):
        sent += done[0]
    return sent


@pytest.mark.parametrize("what", ROWS)
def test_a_row_of_theirs(shop: Shop, what: str) -> None:
    """It is sent as it is, or is set aside after some attempts; no code of theirs runs, and ours goes on."""
    row, is_sent = ROWS[what]
    if "huge body" in what and shop.database.engine.dialect.name != "postgresql":
        pytest.skip("the table's column does not hold it")
    RUN.clear()
    text = row if isinstance(row, str) else json.dumps(row).replace("QUEUE", shop.queue)
    shop.insert(text)
    with shop.db.unit_of_work():
        shop.note.delay_on_commit("ours")
    assert send_all(shop) == (1 if is_sent else 0)
    for _ in range(10):
        shop.make_due()
        send_all(shop)
    assert shop.waiting() == ([] if is_sent else [["theirs"]])
    assert shop.database.column(f"SELECT attempts FROM {TABLE} WHERE due_at IS NULL") == ([] if is_sent else [10])
    arrived = shop.messages()
    assert [one.decode()[0] for one in arrived if one.headers.get("id") not in {"theirs", "x", None}] == [["ours"]]
    assert RUN == []


@pytest.mark.parametrize("given", ["a\0b", "half \ud83d", "long" * 100, " ends in spaces  ", 12345, uuid.UUID(int=7)])
@pytest.mark.parametrize("exactly_once", [False, True])
def test_an_id_of_ours_that_a_column_does_not_hold(shop: Shop, given: Any, exactly_once: bool) -> None:
    """The COMMIT of the sender failed, or a message was not kept until its receiver had completed."""

    @shop.app.task(base=DatabaseTask, bind=True, shared=False, name="work", exactly_once=exactly_once)
    def work(self: Any) -> None: ...

    with shop.db.unit_of_work():
        work.apply_async_on_commit(task_id=given)
    assert [one[0] for one in shop.sent()] == [given]
    recorded = recorded_id(str(given))
    assert shop.waiting() == ([[recorded]] if exactly_once else [])
    received.received(shop.db).add(Key(recorded))
    received.received(shop.db).drop()
    assert shop.waiting() == []


@pytest.mark.parametrize("what", COLUMNS)
def test_columns_of_theirs(shop: Shop, what: str) -> None:
    shop.insert(json.dumps(message()).replace("QUEUE", shop.queue), **COLUMNS[what])
    with shop.db.unit_of_work():
        shop.note.delay_on_commit("ours")
    sent = send_all(shop)
    assert sent == (0 if what in {"expired since ever", "due never", "set aside"} else 1)
    assert ["ours"] in shop.arguments()


def test_a_name_is_no_line_of_the_log(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.insert("{}", task="note\nERROR forged", task_id="\x1b[2J", attempts=9)
    shop.insert(json.dumps({**message(), "x\nERROR forged": 1}))
    assert outbox.send_waiting(shop.db) == (0, 2)
    assert len(caplog.records) == 3
    assert not any(character in record.getMessage() for record in caplog.records for character in "\n\x1b")


def test_all_of_it_together(shop: Shop) -> None:
    """One after another in the same look."""
    rows = {what: row for what, row in ROWS.items() if "huge body" not in what}
    for row, _ in rows.values():
        shop.insert(row if isinstance(row, str) else json.dumps(row).replace("QUEUE", shop.queue))
    with shop.db.unit_of_work():
        shop.note.delay_on_commit("ours")
    assert send_all(shop) == sum(is_sent for _, is_sent in rows.values())
    assert len(shop.waiting()) == sum(not is_sent for _, is_sent in rows.values())


def test_names_of_theirs_are_not_remembered(shop: Shop, tmp_path: Path) -> None:
    """A worker consumes from all queues that its app knows: theirs are not among them."""
    before = set(shop.app.amqp.queues)
    shop.insert(json.dumps(message(queues=["a-queue-of-theirs"])).replace("QUEUE", "a-queue-of-theirs"))
    assert send_all(shop) == 1
    assert set(shop.app.amqp.queues) == before
