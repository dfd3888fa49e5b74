"""Send tasks and learn how they ended, without a result backend: many senders, one reader.

A worker answers in a list, or, if it knows nothing of load tests, by Celery's own task events.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import gevent
import redis
from celery import Celery
from gevent.event import Event
from gevent.queue import Empty, Queue

from ..bench.rows import UNANSWERED, TaskRow
from ..errors import LoadTestError
from ..services.environment import WorkerEnvironment
from ..tasks.replies import Outcome, Reply, ReplyList

REPLY_HEADER = "loadtest_reply"
POLL_S = 0.25  # How long the reader waits for replies before it looks for tasks that are overdue
RETRY_S = 0.2
REMEMBERED = 50_000  # Ended tasks that are remembered, so that a second final reply is recognised as one
CLOCK_SLACK_S = 0.001
UNSENT_S = 0.05  # How long to wait after a task that could not be sent
CONNECT_S = 10.0
BATCH = 500
OUTCOMES = {
    "task-succeeded": Outcome.SUCCESS,
    "task-failed": Outcome.FAILURE,
    "task-rejected": Outcome.FAILURE,
    "task-revoked": Outcome.FAILURE,
    "task-retried": Outcome.RETRY,
}

logger: logging.Logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Pending:
    """A task that was sent."""

    row: TaskRow  # What is known of it: filled in as replies come
    deadline: float  # In `time.monotonic()` seconds
    on_end: Callable[[Pending], None] | None = None
    final: Reply | None = None  # The reply that ended it; None while it runs, and if it was given up
    error: Exception | None = None  # Why it could not be sent
    ended: Event = field(default_factory=Event)

    def wait(self) -> None:
        """Wait for its end; a moment longer where it could not be sent: without a broker each send fails at once."""
        self.ended.wait()
        if self.error is not None:
            gevent.sleep(UNSENT_S)

    def end(self) -> None:
        """Wake whoever waits: a final reply came, or there is no hope for one."""
        if not self.ended.is_set():
            self.ended.set()
            if self.on_end:
                self.on_end(self)


class ListReplies:
    """Replies from a Redis list that only this process reads."""

    def __init__(self, reply_url: str, prefix: str) -> None:
        # Several processes send to one queue: each gets the replies to its own tasks.
        key = f"{prefix or 'celery-alchemy'}.replies.{os.getpid()}-{secrets.token_hex(4)}"
        self.headers: dict[str, str] = {REPLY_HEADER: key}  # What a task has to carry so that it is answered
        self._list = ReplyList(reply_url, key)

    def pop(self, timeout_s: float) -> Iterable[Reply]:
        """Wait for replies; return up to some hundred."""
        return [Reply.from_json(message) for message in self._list.pop(timeout_s)]

    def close(self) -> None:
        """Delete the list, and disconnect."""
        with contextlib.suppress(redis.RedisError):  # One that is left expires.
            self._list.delete()
        self._list.close()


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


class _NoResult(str):
    """Instead of an AsyncResult, which would open a result backend."""


class ReplyHub:
    """Sends tasks to one queue; one greenlet reads the replies, however many tasks wait."""

    def __init__(
        self, app: Any, replies: ListReplies | EventReplies, *, queue: str = "", timeout_s: float = 60.0
    ) -> None:
        """Connect nothing yet; start the reader.

        Args:
            app: The Celery app to send with; it is closed with the hub.
            queue: Empty for what the app's own routes say.
            timeout_s: A task that is not answered after this time counts as unanswered.
        """
        self._app, self._replies, self._timeout_s = app, replies, timeout_s
        self._options = {"queue": queue} if queue else {}
        self._pending: dict[str, Pending] = {}
        self._ended: OrderedDict[str, Pending] = OrderedDict()
        self._prefix, self._numbers = secrets.token_hex(8), count(1)
        self.strangers: int = 0  # Replies to tasks that this hub did not send, or has forgotten
        self._idle = Event()
        self._idle.set()
        self._closed = False
        self._reader = gevent.spawn(self._read)

    @classmethod
    def on(cls, broker_url: str, queue: str, reply_url: str, timeout_s: float = 60.0) -> ReplyHub:
        """Return a hub with an app that knows no tasks, and a list for replies of its own."""
        app = Celery("celery-alchemy-load", set_as_current=False)
        app.conf.update(WorkerEnvironment("", broker_url, reply_url, queue).celery_settings())
        return cls(app, ListReplies(reply_url, queue), timeout_s=timeout_s)

    def submit(
        self, task_name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, label: str = "",
        number: int = 0, arm: str = "", slice_number: int = 0, intended: float | None = None,
        timeout_s: float | None = None, on_end: Callable[[Pending], None] | None = None,
    ) -> Pending:  # fmt: skip
        """Send a task, and return at once.

        Args:
            label: As the task is called in its row, which also has number, arm and slice; its name by default.
            intended: When it should have been sent, in `time.monotonic()` seconds; now by default.
            timeout_s: For this task, instead of the hub's.
            on_end: Called once, in the reader's greenlet: it must not wait for anything.
        Returns:
            A pending task; one that could not be sent has ended already, with an `error`.
        """
        now = time.monotonic()
        # A counter, not a random number per task: 30 us less.
        task_id = f"{self._prefix}-{next(self._numbers)}"
        row = TaskRow(
            slice_number, arm, label or task_name, number, task_id, now if intended is None else intended, sent=now,
            started=0.0, ended=0.0, outcome=UNANSWERED, attempts=0, checkout_ms=0.0, database_ms=0.0, finals=0,
        )  # fmt: skip
        pending = Pending(row, now + (self._timeout_s if timeout_s is None else timeout_s), on_end)
        self._pending[task_id] = pending
        self._idle.clear()
        row.sent = time.monotonic()
        try:
            self._app.send_task(
                task_name, args, dict(kwargs or {}), task_id=task_id, headers=self._replies.headers.copy(),
                ignore_result=True, result_cls=_NoResult, **self._options,
            )  # fmt: skip
        except Exception as error:
            # Each transport raises its own kinds; whichever, this task counts, and the load goes on.
            pending.error, row.error_type, row.error = error, type(error).__name__, str(error)
            self._drop(pending)
        return pending

    def give_up(self, pendings: Iterable[Pending] | None = None) -> None:
        """Stop waiting for tasks that are still unanswered; by default for all."""
        for pending in list(self._pending.values() if pendings is None else pendings):
            self._drop(pending)

    def forget(self) -> None:
        """Forget the tasks that have ended: a reply to one of them is a stranger's from now on."""
        self._ended.clear()

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; return whether that came true."""
        return bool(self._idle.wait(timeout_s))

    def close(self) -> None:
        """Give up what is in flight; disconnect."""
        self._closed = True
        self._reader.join(2 * POLL_S + 1)
        self._reader.kill()
        self.give_up()
        self._replies.close()
        self._app.close()

    def _drop(self, pending: Pending) -> None:
        self._pending.pop(pending.row.task_id, None)
        if not self._pending:
            self._idle.set()
        pending.end()

    def _read(self) -> None:
        next_look = 0.0
        while not self._closed:
            try:
                for reply in self._replies.pop(POLL_S):
                    self._take(reply)
            except (OSError, redis.RedisError) as error:
                logger.warning("Replies cannot be read, trying again: %s", error)
                gevent.sleep(RETRY_S)
            now = time.monotonic()
            if now >= next_look:
                next_look = now + POLL_S
                self.give_up([pending for pending in self._pending.values() if now > pending.deadline])

    def _take(self, reply: Reply) -> None:
        pending = self._pending.get(reply.task_id) or self._ended.get(reply.task_id)
        if pending is None:
            self.strangers += 1
            return
        row = pending.row
        row.breach = row.breach or reply.breach
        # Celery's events do not number attempts: they are counted. A pool process tells of a retry after it has sent
        # it, so that another one can be faster to tell of the end: its number is more than what was counted.
        row.attempts = max(row.attempts + (not row.finals), reply.attempt)
        if reply.outcome is Outcome.RETRY:
            return
        row.finals += 1
        if row.finals > 1:
            return
        pending.final = reply = _on_this_clock(reply, row.sent, time.monotonic())
        row.outcome, row.started, row.ended, row.pid = reply.outcome.value, reply.started, reply.ended, reply.pid
        row.checkout_ms, row.database_ms = reply.checkout_ms, reply.database_ms
        row.error_type, row.error = reply.error_type or "", reply.error or ""
        self._ended[reply.task_id] = pending
        if len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
        self._drop(pending)


def _on_this_clock(reply: Reply, sent: float, now: float) -> Reply:
    """Return the reply with times of this host's clock; if it is of another host, as if it had travelled in no time."""
    if sent - CLOCK_SLACK_S <= reply.ended <= now + CLOCK_SLACK_S:
        return reply
    return replace(reply, started=now - (reply.ended - reply.started), ended=now)
