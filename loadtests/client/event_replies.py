"""Replies from a worker that knows nothing of load tests: Celery's own task events."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import gevent
from gevent.event import Event
from gevent.queue import Empty, Queue

from ..errors import LoadTestError
from ..tasks.replies import Outcome, Reply

CONNECT_S = 10.0
RETRY_S = 0.5
BATCH = 500
OUTCOMES = {
    "task-succeeded": Outcome.SUCCESS,
    "task-failed": Outcome.FAILURE,
    "task-rejected": Outcome.FAILURE,
    "task-revoked": Outcome.FAILURE,
    "task-retried": Outcome.RETRY,
}

logger: logging.Logger = logging.getLogger(__name__)


class EventReplies:
    """Makes replies of the events of all tasks of an app; the worker has to send them.

    An event is stamped when the worker sends it, shortly after the task has ended; it knows nothing of the database.
    """

    def __init__(self, app: Any) -> None:
        """Connect.

        Raises:
            LoadTestError: The broker does not let us.
        """
        self.headers: dict[str, str] = {}  # any task is reported
        self._app = app
        self._replies: Queue[Reply] = Queue()
        self._started: dict[str, float] = {}
        self._ready, self._closed = Event(), False
        self._greenlet = gevent.spawn(self._capture)
        if not self._ready.wait(CONNECT_S):
            self.close()
            raise LoadTestError(f"The broker of {app.main or 'the app'} sent no events within {CONNECT_S:g} s.")

    def pop(self, timeout_s: float) -> Iterable[Reply]:
        """Wait for replies; return up to some hundred."""
        found: list[Reply] = []
        with contextlib.suppress(Empty):
            while len(found) < BATCH:
                found.append(self._replies.get(timeout=0 if found else timeout_s))
        return found

    def close(self) -> None:
        """Disconnect."""
        self._closed = True
        self._greenlet.kill()

    def _capture(self) -> None:
        while not self._closed:
            try:
                with self._app.connection_for_read() as connection:
                    receiver = self._app.events.Receiver(connection, handlers={"*": self._take})
                    # Called once the queue is bound: an event that is sent from now on arrives.
                    receiver.on_consume_ready = lambda *_, **__: self._ready.set()
                    receiver.capture(limit=None, timeout=None, wakeup=False)
            except Exception as error:
                # Each transport raises its own kinds.
                logger.warning("Events cannot be read, trying again: %s", error)
                gevent.sleep(RETRY_S)

    def _take(self, event: dict[str, Any]) -> None:
        task_id = event.get("uuid", "")
        # Events carry the time of day.
        at = time.monotonic() - (time.time() - event["timestamp"])
        if event["type"] == "task-started":
            self._started[task_id] = at
            return
        outcome = OUTCOMES.get(event["type"])
        if outcome is None:
            return
        started = self._started.pop(task_id, at - event.get("runtime", 0.0))
        reply = Reply(task_id, outcome, started, at, event.get("pid") or 0)
        if outcome is not Outcome.SUCCESS:
            kind, _, message = str(event.get("exception") or event["type"]).partition("(")
            reply = replace(reply, error_type=kind, error=message.rstrip(")"))
        self._replies.put(reply)
