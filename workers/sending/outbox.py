"""Messages that wait for a COMMIT, in the database instead of in memory.

The walk: `delay()` in a unit of work registers a message for its COMMIT, as without an outbox. Before the COMMIT all
those of the transaction are written into one row; after it, the process that committed sends that row. Whatever it does
not get to send, `celery alchemy outbox run` sends, or any process that sends something of its own later.
"""

from __future__ import annotations

import base64
import logging
import time
from typing import Any

from celery import Celery
from kombu import Queue, serialization
from kombu.exceptions import OperationalError
from kombu.utils import json
from sqlalchemy import event
from sqlalchemy.orm import Session

from ...strategies.errors import CeleryAlchemyError
from ...strategies.features import outbox
from ...strategies.on_commit import CommitCallbacks
from ...strategies.sessions import waiting_of
from ..apps import Served

logger = logging.getLogger(__name__)

LEFTOVERS_EVERY_S = 10.0
"""A process that sends something of its own looks for what others have left this often."""
BATCH = 50
_WATCHED = "celery_alchemy.outbox"
#: Of the sending process, and of no use to another.
_LOCAL_OPTIONS = frozenset(
    {"task_type", "result_cls", "add_to_parent", "connection", "router", "producer", "publisher", "retry_policy"}
)


class Stored:
    """A message that waits for a COMMIT and is to be written down before it."""

    __slots__ = ("_app", "message", "name", "task_id")

    def __init__(self, app: Celery, name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> None:
        self._app, self.name, self.task_id = app, name, options["task_id"]
        self.message = _to_message(app, name, args, kwargs, options)

    def __call__(self) -> None:
        """Send it: there was no transaction to write it into."""
        _send_message(self._app, self.message)

    def __repr__(self) -> str:
        return f"sending {self.name}[{self.task_id}]"


def watch(db: Served, session: Session) -> None:
    """Write what waits for the COMMIT of `session` into the outbox before it; begin a transaction if there is none."""
    if not session.in_transaction():
        session.begin()
    if _WATCHED not in session.info:
        session.info[_WATCHED] = True
        event.listen(session, "before_commit", lambda session: _write(db, session))


def _write(db: Served, session: Session) -> None:
    if session.in_nested_transaction():
        return  # a savepoint is released, nothing is committed
    waiting: CommitCallbacks | None = waiting_of(session)
    messages = waiting.take(Stored) if waiting is not None else []
    if waiting is not None and messages:
        row_id = outbox.write(session, json.dumps([stored.message for stored in messages]))
        waiting.add(Delivery(db, row_id, len(messages)), None)


class Delivery:
    """Sends a row of the outbox once it is committed."""

    __slots__ = ("_count", "_db", "_row_id")

    def __init__(self, db: Served, row_id: int, count: int) -> None:
        self._db, self._row_id, self._count = db, row_id, count

    def __call__(self) -> None:
        app = self._db.app
        assert app is not None
        try:
            with self._db.unit_of_work() as session:
                outbox.send_row(session, self._row_id, lambda messages: send_messages(app, messages))
        except OperationalError as error:
            logger.warning("%r could not be sent, and stays in the outbox: %s", self, error)
            return
        _send_leftovers(self._db)

    def __repr__(self) -> str:
        return f"row {self._row_id} of the outbox ({self._count} messages)"


_last_look = 0.0


def _send_leftovers(db: Served) -> None:
    global _last_look  # noqa: PLW0603 - once for all of the process
    now = time.monotonic()
    if now - _last_look >= LEFTOVERS_EVERY_S:
        _last_look = now
        send_waiting(db)


def send_waiting(db: Served, count: int = BATCH) -> tuple[int, int]:
    """Send up to `count` rows that wait in the outbox; return how many were sent, and how many could not be.

    Raises:
        kombu.exceptions.OperationalError: the broker cannot be reached; nothing is deleted.
    """
    app = db.app
    assert app is not None
    sent = failed = 0
    with db.unit_of_work() as session:
        for error in outbox.send_some(session, count, lambda messages: send_messages(app, messages)):
            if isinstance(error, OperationalError):
                raise error
            if error is not None:
                failed += 1
                logger.error("A row of the outbox could not be sent, and stays: %s: %s", type(error).__name__, error)
            else:
                sent += 1
    return sent, failed


def send_messages(app: Celery, messages: str) -> None:
    """Send the messages of one row, in their order."""
    for message in json.loads(messages):
        _send_message(app, message)


def _to_message(app: Celery, name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> dict[str, Any]:
    serializer = options.get("serializer") or app.conf.task_serializer
    content_type, encoding, data = serialization.dumps((args, kwargs), serializer)
    binary = isinstance(data, bytes)
    kept = {key: value for key, value in options.items() if key not in _LOCAL_OPTIONS and value is not None}
    if isinstance(kept.get("queue"), Queue):
        kept["queue"] = kept["queue"].name
    parent = app.current_worker_task
    if parent is not None and parent.request.id:
        kept.setdefault("parent_id", parent.request.id)
        kept.setdefault("root_id", parent.request.root_id or parent.request.id)
    message = {
        "name": name,
        "content_type": content_type,
        "encoding": encoding,
        "body": base64.b64encode(data).decode() if binary else data,
        "binary": binary,
        "options": kept,
    }
    try:
        json.dumps(message)
    except TypeError as error:
        raise CeleryAlchemyError(
            f"{name} cannot be put into the outbox, for an option of this call cannot be written as JSON: {error}. "
            f"Options: {', '.join(sorted(kept))}. Leave it out, or send at once with enqueue_on_commit=False."
        ) from error
    return message


def _send_message(app: Celery, message: dict[str, Any]) -> None:
    data = base64.b64decode(message["body"]) if message["binary"] else message["body"]
    content_type = message["content_type"]
    args, kwargs = serialization.loads(data, content_type, message["encoding"], accept=[content_type])
    # At once: this message has waited already. JSON has made a list of the tuple, which its `argsrepr` would show.
    app.send_task(message["name"], tuple(args or ()), kwargs, **message["options"], enqueue_on_commit=False)
