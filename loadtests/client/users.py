"""Locust users that send Celery tasks."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from itertools import count
from types import MappingProxyType
from typing import Any

import gevent
from locust import User
from locust.exception import StopTest

from ..errors import LoadTestError
from ..tasks.replies import redis_url
from ..tasks.workloads import Workload
from . import options, run
from .hub import ListReplies, Pending, ReplyHub

# Locust processes do not begin with the same numbers.
_numbers = count(random.randrange(10**6) * 10)  # noqa: S311 - no secret.

run.register()
options.register(options.add_thresholds)


class CeleryUser(User):
    """Sends a task, waits until it has ended, and sends the next: as many tasks are in flight as there are users.

    Set `task_name` for one task over and over, or write Locust tasks that call `run_task`:

        class Importer(CeleryUser):
            broker_url = "redis://localhost/0"
            queue = "imports"

            @task
            def import_order(self):
                self.run_task("proj.tasks.import_order", [random.randrange(1000)])

    The worker has to load the replies: `celery -A proj worker -I celery_alchemy.loadtests.reporting`, with the
    variable LOADTEST_REPLY_URL.
    """

    abstract = True
    tasks: list[Any]
    app: Any = None
    """The Celery app to send with; None: one that knows `broker_url` and `queue` only."""
    broker_url: str = ""
    """Kombu URL; not needed with an `app`."""
    queue: str = ""
    """Where tasks go; empty: where the app routes them, or `celery`."""
    reply_url: str = ""
    """redis-py URL of the server with the reply lists; empty: the broker, if that is Redis or Valkey."""
    reply_timeout_s: float = 60.0
    """A task that is not answered after this time counts as failed."""
    task_name: str = ""
    task_args: Sequence[Any] = ()
    task_kwargs: Mapping[str, Any] = MappingProxyType({})
    workload: Workload | None = None
    """One of ours, run in place of `task_name`."""
    rate: float | None = None
    """Arrivals per second, of each user, independent of each other; None: it waits for the end of each task."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if not cls.tasks and (cls.task_name or cls.workload):
            cls.tasks = [CeleryUser.run_own_task]

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.load_run: run.Run = run.run_of(environment)
        hubs, kind = self.load_run.hubs, type(self)
        try:
            self.hub: ReplyHub = hubs.get(kind) or hubs.setdefault(kind, self.make_hub())
        except LoadTestError as error:
            raise StopTest(str(error)) from error
        self._intended: float | None = None

    def make_hub(self) -> ReplyHub:
        """Return a hub for all users of this class in this process.

        Raises:
            StopTest: The class does not say where tasks and replies go.
        """
        broker_url = self.broker_url or (self.app.conf.broker_write_url or "" if self.app else "")
        reply_url, name = self.reply_url or redis_url(broker_url), type(self).__name__
        if not broker_url:
            raise StopTest(f"{name}.broker_url is not set, nor is its `app`.")
        if not reply_url:
            raise StopTest(f"{name}.reply_url is not set: the broker is neither Redis nor Valkey.")
        if self.app is None:
            return ReplyHub.on(broker_url, self.queue or "celery", reply_url, self.reply_timeout_s)
        return ReplyHub(self.app, ListReplies(reply_url, self.queue), queue=self.queue, timeout_s=self.reply_timeout_s)

    def on_start(self) -> None:
        """Wait for the first arrival, if there is a rate."""
        if self.rate:
            self._intended = time.monotonic()
            gevent.sleep(self.wait_time())

    def wait_time(self) -> float:
        """Return the seconds until the next arrival; 0 if it is overdue, and without a rate."""
        if self._intended is None or not self.rate:
            return 0.0
        self._intended += random.expovariate(self.rate)
        return max(0.0, self._intended - time.monotonic())

    def run_own_task(self) -> None:
        """Run the task that the class names."""
        if work := self.workload:
            number = next(_numbers)
            self.run_task(work.task_name, (number,), label=work.name, number=number)
        else:
            self.run_task(self.task_name, self.task_args, self.task_kwargs)

    def run_task(
        self, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, label: str = "",
        number: int = 0,
    ) -> Pending:  # fmt: skip
        """Send a task, and, without a rate, wait until it has ended or `reply_timeout_s` is over.

        Fires one `request` event with the latency in milliseconds, from before the task was sent, or from when it was
        due, to its end in the worker, and logs how long it was queued, run, and busy with the database in rows of
        their own.

        Args:
            label: What Locust shows instead of the task's name.
            number: Of a task of `workload`: what it was meant to do follows from it.
        Returns:
            The task; once it has ended with its `final` reply, or None.
        """
        context, due = self.context(), self._intended

        def ended(pending: Pending) -> None:
            self.load_run.ended(pending.row, self.workload, arrival=due is not None, context=context)

        # Locust kills users that it stops. In a greenlet of its own, sending is not cut off in the middle, which would
        # leave half a message on the connection; and the reader counts a task for which its user waits no more.
        facts = {"label": label, "number": number, "intended": due, "on_end": ended}
        pending: Pending = gevent.spawn(self.hub.submit, name, args, kwargs, **facts).get()
        if due is None:
            pending.wait()
        return pending


class ArrivalUser(CeleryUser):
    """Sends tasks at a rate, whatever the worker does; latency counts from when a task should have been sent.

    A closed model waits while the worker stalls, and so measures the stall once per user; arrivals go on, and each of
    them that had to wait shows in the percentiles. Tasks are written as for `CeleryUser`; `run_task` does not wait.
    """

    abstract = True
    rate: float | None = 1.0
