"""An app with an outbox, what has arrived through its broker, and what waits."""

import contextlib
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import text

from celery_alchemy import Alchemy, DatabaseTask
from celery_alchemy.workers.errors import BrokerGone
from celery_alchemy.workers.sending import broker
from celery_alchemy.workers.sending.broker import Breaker, Broker
from support.databases import Database

TABLE = "celery_alchemy_outbox"


class Shop:
    """An app with an outbox, and what has been sent through its broker."""

    def __init__(self, database: Database, url: str | None = None, broker_url: str = "memory://", **settings: Any):
        self.database = database
        self.queue = settings.setdefault("task_default_queue", f"outbox-{uuid.uuid4().hex}")
        self.app = Celery("outbox", broker=broker_url, set_as_current=False)
        self.app.conf.update(
            alchemy_database_url=url or database.url("outbox"),
            **{"alchemy_outbox": True, **settings},
        )
        self.db = Alchemy(self.app)
        if url is None:
            database.execute(f"DELETE FROM {TABLE}")

        @self.app.task(base=DatabaseTask, bind=True, shared=False, name="note")
        def note(task: Any, *args: Any, **kwargs: Any) -> None:
            pass

        self.note = note

    def sent(self, queue: str | None = None) -> list[Any]:
        """Return what has arrived since the last look: id, arguments, headers."""
        return [(message.headers["id"], message.decode()[0], message.headers) for message in self.messages(queue)]

    def messages(self, queue: str | None = None) -> list[Any]:
        """Return the messages that have arrived since the last look."""
        found = []
        with self.app.connection_for_read() as connection, connection.SimpleQueue(queue or self.queue) as waiting:
            while True:
                try:
                    message = waiting.get(block=False)
                except waiting.Empty:
                    return found
                message.ack()
                found.append(message)

    def arguments(self) -> list[Any]:
        return [arguments for _, arguments, _ in self.sent()]

    def waiting(self) -> list[list[str]]:
        """Return the ids of the messages that wait, by transaction."""
        found: dict[str, list[str]] = {}
        with self.database.engine.connect() as connection:
            for batch, task_id in connection.execute(text(f"SELECT batch, task_id FROM {TABLE} ORDER BY id")):
                found.setdefault(batch, []).append(task_id)
        return list(found.values())

    def make_due(self) -> None:
        """Let leases and pauses be over."""
        self.database.execute(f"UPDATE {TABLE} SET due_at = 0 WHERE due_at IS NOT NULL")

    def insert(self, message: Any = None, **columns: Any) -> None:
        """Write a row as whoever can write to the table may do it."""
        values = {
            "batch": uuid.uuid4().hex,
            "position": 0,
            "created_at": 0,
            "due_at": 0,
            "task_id": "theirs",
            "task": "note",
            "message": message if isinstance(message, str) else json.dumps(message),
            **columns,
        }
        names, places = ", ".join(values), ", ".join(f":{name}" for name in values)
        self.database.execute(f"INSERT INTO {TABLE} ({names}) VALUES ({places})", **values)

    @contextlib.contextmanager
    def broker_gone(self, monkeypatch: pytest.MonkeyPatch, refused: str = "") -> Iterator[None]:
        """Let nothing be sent, or only what has not `refused` as its argument."""
        original = Broker.publish

        def publish(self: Broker, publication: Any) -> None:
            if not refused:
                raise BrokerGone("the broker is gone")
            if refused.encode() in publication.body:
                raise ValueError("this one cannot be sent")
            original(self, publication)

        with monkeypatch.context() as patch:
            patch.setattr(Broker, "publish", publish)
            patch.setattr(Breaker, "first_pause_s", 0.0)
            yield

    def stop(self) -> None:
        broker.close_idle(self.app)
        self.db.stop()
        self.app.close()
