"""Send tasks and learn how they ended, without a result backend: many senders, one reader."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol

import gevent
import redis
from celery import Celery
from gevent.event import Event

from ..environment import WorkerEnvironment
from ..replies import Outcome, Reply, ReplyList

REPLY_HEADER = "loadtest_reply"
POLL_S = 0.25
"""How long the reader waits for replies before it looks for tasks that are overdue."""
RETRY_S = 0.2
REMEMBERED = 50_000
"""Ended tasks that are remembered, so that a second final reply is recognised as one."""
CLOCK_SLACK_S = 0.001

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """Where tasks are sent."""

    broker_url: str
    """Kombu URL; empty for the app's own."""
    queue: str
    """Empty for what the app's own routes say."""
    reply_url: str
    """redis-py URL of the server with the reply lists; empty where replies come in another way."""


class Pending:
    """A task that was sent."""

    __slots__ = (
        "_deadline",
        "_ended",
        "_on_end",
        "attempts",
        "breach",
        "error",
        "final",
        "finals",
        "intended",
        "received",
        "sent",
        "task_id",
    )

    def __init__(
        self, task_id: str, intended: float, deadline: float, on_end: Callable[[Pending], None] | None
    ) -> None:
        self.task_id = task_id
        self.intended = intended
        """When it should have been sent; `time.monotonic()` seconds, as all times."""
        self.sent = 0.0
        """Just before it was published."""
        self.attempts = 0
        """How often it began."""
        self.breach = ""
        """What was wrong with the Session of any of its attempts."""
        self.finals = 0
        """Final replies: more than one if it ran twice."""
        self.final: Reply | None = None
        """The reply that ended it; None while it runs, and if it was given up."""
        self.received = 0.0
        """When that reply was read."""
        self.error: Exception | None = None
        """Why it could not be sent."""
        self._deadline = deadline
        self._on_end = on_end
        self._ended = Event()

    @property
    def ended(self) -> bool:
        """Whether there is nothing to wait for any more: a final reply, or no hope for one."""
        return bool(self._ended.is_set())

    @property
    def latency_ms(self) -> float:
        """From the intended send time to the end in the worker; 0 if no final reply came."""
        return (self.final.ended - self.intended) * 1000 if self.final else 0.0

    def wait(self) -> None:
        """Wait for the end."""
        self._ended.wait()

    def overdue(self, now: float) -> bool:
        """Whether its time is over."""
        return now > self._deadline

    def end(self) -> None:
        """Wake whoever waits."""
        if not self._ended.is_set():
            self._ended.set()
            if self._on_end:
                self._on_end(self)


class Replies(Protocol):
    """Where replies come from."""

    def headers(self) -> dict[str, str]:
        """Return what a task has to carry so that it is answered."""

    def pop(self, timeout_s: float) -> Iterable[Reply]:
        """Wait for replies; return what there is."""

    def close(self) -> None:
        """Disconnect."""


class ListReplies:
    """Replies from a Redis list that only this process reads."""

    def __init__(self, reply_url: str, prefix: str) -> None:
        # Several processes send to one queue: each gets the replies to its own tasks.
        self._key = f"{prefix or 'celery-alchemy'}.replies.{os.getpid()}-{secrets.token_hex(4)}"
        self._list = ReplyList(reply_url, self._key)
        self._client: Any = redis.Redis.from_url(reply_url)

    def headers(self) -> dict[str, str]:
        """Return the name of the list."""
        return {REPLY_HEADER: self._key}

    def pop(self, timeout_s: float) -> Iterable[Reply]:
        """Wait for replies; return up to some hundred."""
        return [Reply.from_json(message) for message in self._list.pop(timeout_s)]

    def close(self) -> None:
        """Delete the list, and disconnect."""
        try:
            self._client.delete(self._key)
        except redis.RedisError:
            logger.debug("The reply list was not deleted; it expires.", exc_info=True)
        self._list.close()
        self._client.close()


class _NoResult:
    """Instead of an AsyncResult, which would open a result backend."""

    def __init__(self, task_id: str) -> None:
        self.id = task_id


class ReplyHub:
    """Sends tasks to one target; one greenlet reads the replies, however many tasks wait."""

    def __init__(
        self, target: Target, *, app: Any = None, replies: Replies | None = None, timeout_s: float = 60.0
    ) -> None:
        """Connect nothing yet; start the reader.

        Args:
            app: The Celery app to send with; by default one that knows no tasks.
            replies: Where replies come from; by default a list of this process on `target.reply_url`.
            timeout_s: A task that is not answered after this time counts as unanswered.
        """
        self._app = app or sending_app(target)
        self._own_app = app is None
        self._queue = target.queue if app is not None else ""
        self._replies = replies or ListReplies(target.reply_url, target.queue)
        self._headers = self._replies.headers()
        self._timeout_s = timeout_s
        self._pending: dict[str, Pending] = {}
        self._ended: OrderedDict[str, Pending] = OrderedDict()
        self._prefix, self._numbers = secrets.token_hex(8), count(1)
        self._idle = Event()
        self._idle.set()
        self.strangers = 0
        """Replies to tasks that this hub did not send, or has forgotten."""
        self.repeated = 0
        """Second final replies to the same task."""
        self._closed = False
        self._reader = gevent.spawn(self._read)

    @property
    def in_flight(self) -> int:
        """Tasks that were sent, and are neither answered nor given up."""
        return len(self._pending)

    def submit(
        self,
        task_name: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        intended: float | None = None,
        timeout_s: float | None = None,
        on_end: Callable[[Pending], None] | None = None,
    ) -> Pending:
        """Send a task, and return at once.

        Args:
            intended: When it should have been sent, in `time.monotonic()` seconds; now by default.
            timeout_s: For this task, instead of the hub's.
            on_end: Called once, in the reader's greenlet: it must not wait for anything.
        Returns:
            A pending task; one that could not be sent has ended already, with an `error`.
        """
        now = time.monotonic()
        # A counter, not a random number per task: 30 us less.
        task_id = f"{self._prefix}-{next(self._numbers)}"
        limit = self._timeout_s if timeout_s is None else timeout_s
        pending = Pending(task_id, now if intended is None else intended, now + limit, on_end)
        self._pending[task_id] = pending
        self._idle.clear()
        options: dict[str, Any] = {"queue": self._queue} if self._queue else {}
        pending.sent = time.monotonic()
        try:
            self._app.send_task(
                task_name,
                args,
                dict(kwargs or {}),
                task_id=task_id,
                headers=dict(self._headers),
                ignore_result=True,
                result_cls=_NoResult,
                **options,
            )
        except Exception as error:
            # Each transport raises its own kinds; whichever, this task counts, and the load goes on.
            pending.error = error
            self._drop(pending)
        return pending

    def unanswered(self) -> list[Pending]:
        """Return what is in flight."""
        return list(self._pending.values())

    def give_up(self, pendings: Iterable[Pending]) -> None:
        """Stop waiting for tasks that are still unanswered."""
        for pending in pendings:
            if not pending.ended:
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
        self.give_up(self.unanswered())
        self._replies.close()
        if self._own_app:
            self._app.close()

    def _drop(self, pending: Pending) -> None:
        self._pending.pop(pending.task_id, None)
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
                self.give_up([pending for pending in self._pending.values() if pending.overdue(now)])

    def _take(self, reply: Reply) -> None:
        pending = self._pending.get(reply.task_id) or self._ended.get(reply.task_id)
        if pending is None:
            self.strangers += 1
            return
        pending.breach = pending.breach or reply.breach
        # Celery's events do not number attempts: they are counted. A pool process tells of a retry after it has sent
        # it, so that another one can be faster to tell of the end: its number is more than what was counted.
        pending.attempts = max(pending.attempts + (not pending.finals), reply.attempt)
        if reply.outcome is Outcome.RETRY:
            return
        pending.finals += 1
        if pending.finals > 1:
            self.repeated += 1
            return
        pending.received = time.monotonic()
        pending.final = _on_this_clock(reply, pending.sent, pending.received)
        self._ended[reply.task_id] = pending
        if len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
        self._drop(pending)


def sending_app(target: Target) -> Any:
    """Return a Celery app that only sends."""
    app = Celery("celery-alchemy-load", set_as_current=False)
    app.conf.update(WorkerEnvironment("", target.broker_url, target.reply_url, target.queue).celery_settings())
    return app


def _on_this_clock(reply: Reply, sent: float, now: float) -> Reply:
    """Return the reply with times of this host's clock; if it is of another host, as if it had travelled in no time."""
    if sent - CLOCK_SLACK_S <= reply.ended <= now + CLOCK_SLACK_S:
        return reply
    return replace(reply, started=now - (reply.ended - reply.started), ended=now)
