"""Canvases of tasks with `exactly_once` and an outbox: messages are delivered by hand, lost or delivered twice."""

import asyncio
import gc
from collections.abc import Callable
from typing import Any

from celery import _state, current_app
from celery.app.trace import build_tracer
from sqlalchemy import text

from celery_alchemy.workers.sending.received import received
from celery_alchemy.workers.sending.sender import send_waiting
from support.databases import Database
from support.exactly_once import Once, done, new_id
from support.project.models import Row
from support.worker import Site

OUTBOX, COMPLETED = "celery_alchemy_outbox", "celery_alchemy_completed"
LONG_S = 1000.0
OF_REDIS_RESULTS = (
    "ignore:Call to deprecated setex:DeprecationWarning",  # Celery's
    "ignore:unclosed <socket:ResourceWarning",  # Celery leaves those of the result backend to the garbage collector
)
"""Warnings to ignore in tests with results in Redis."""


def redis_results(site: Site, **options: Any) -> dict[str, Any]:
    """Return the settings of an app with results in Redis, which has these transport options too."""
    options |= {"global_keyprefix": site.prefix}
    return {"result_backend": site.urls.celery, "result_backend_transport_options": options}


class RolledBack(Exception):
    """Ends a transaction."""


class Flows(Once):
    """An app with an outbox, whose tasks leave a trace. Nothing is sent but by `send`, nothing runs but by `work`."""

    def __init__(self, database: Database, **changes: Any) -> None:
        self.queue = f"flows-{new_id()}"
        defaults = {
            "alchemy_outbox": "relay",
            "alchemy_exactly_once": True,
            "alchemy_outbox_resend_s": LONG_S,
            "task_default_queue": self.queue,
        }
        super().__init__(database, **{**defaults, **changes})
        database.execute(f"DELETE FROM {OUTBOX}")
        # As in a worker: Celery sends the members of a group by the current app, in the thread of an event loop too.
        self._before = current_app._get_current_object(), _state.default_app
        self.app.set_current()
        self.app.set_default()
        self.bodies: list[str] = []
        """The notes of the bodies that have run."""

        @self.task(name="step", max_retries=3)
        async def step(task: Any, got: Any, key: str, note: str) -> str:
            self.bodies.append(note)
            task.db.add(Row(key=key, note=f"{_shown(got)}>{note}"))
            await done(task.db.flush())
            return note

        self.step = step

    def close(self) -> None:
        self._before[0].set_current()
        _state.set_default_app(self._before[1])
        is_redis = hasattr(self.app.backend, "result_consumer")
        if is_redis:
            self.app.backend.result_consumer.stop()
            self.app.backend.client.connection_pool.disconnect()
        super().close()
        if is_redis:
            gc.collect()  # backends of other threads, as long as an open socket is no error

    def by_outbox(self, what: Any, *args: Any, fails: bool = False) -> None:
        """Send `what` with the COMMIT of a transaction; one that `fails` is rolled back, and says so."""
        if not self.awaits:
            with self.db.unit_of_work() as session:
                session.execute(text("SELECT 1"))
                self.db.delay_on_commit(what, *args)
                if fails:
                    raise RolledBack
            return

        async def send() -> None:
            try:
                async with self.db.async_unit_of_work() as session:
                    await session.execute(text("SELECT 1"))
                    self.db.delay_on_commit(what, *args)
                    if fails:
                        raise RolledBack
            finally:
                await self.db.async_engine.dispose()

        asyncio.run(send())

    # -- the broker --------------------------------------------------------------------------------------------------

    def send(self) -> int:
        """Send what is due in the outbox; return how many messages that were."""
        return send_waiting(self.db)[0]

    def taken(self) -> list[Any]:
        """Take what is in the queue."""
        found = []
        with self.app.connection_for_read() as connection, connection.SimpleQueue(self.queue) as waiting:
            while True:
                try:
                    message = waiting.get(block=False)
                except waiting.Empty:
                    return found
                message.ack()
                found.append(message)

    def run(self, message: Any, **more: Any) -> tuple[str, Any]:
        """Run the task of a message, as a worker does; return its state and its result."""
        args, kwargs, embed = message.decode()
        task = self.app.tasks[message.headers["task"]]
        info = {"redelivered": False, "priority": None, **more}
        request = {**message.headers, **embed, "delivery_info": info, "is_eager": False}
        tracer = build_tracer(task.name, task, app=self.app, propagate=False)
        retval, info_, *_ = tracer(request["id"], args, kwargs, request)
        return (info_.state, info_.retval) if info_ is not None else ("SUCCESS", retval)

    def work(self, copies: int = 1, loses: Callable[[Any], bool] = lambda message: False) -> list[str]:
        """Send and run until nothing is left; return the names of the tasks that ran, as often as they were delivered.

        Args:
            copies: Each message is delivered so often.
            loses: The broker loses messages for which that is true.
        """
        ran = []
        while self.send() or True:
            messages = [message for message in self.taken() if not loses(message)]
            if not messages:
                return ran
            for message in messages:
                for number in range(copies):
                    self.run(message, redelivered=bool(number))
                    ran.append(message.headers["task"])
        return ran

    # -- what is left ------------------------------------------------------------------------------------------------

    def outbox(self) -> list[tuple[Any, ...]]:
        """Return what is in the outbox: the names of tasks, their ids, how often they were replaced and sent."""
        sql = f"SELECT task, task_id, nesting, sends FROM {OUTBOX} ORDER BY id"
        with self.database.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(sql))]

    def later(self) -> None:
        """Let the pause before messages are sent again be over."""
        self.database.execute(f"UPDATE {OUTBOX} SET due_at = 0 WHERE due_at IS NOT NULL")

    def sweep(self) -> None:
        """Delete what has been received, as this process does some seconds later."""
        received(self.db).drop()

    def traces(self, key: str) -> list[str]:
        return sorted(self.database.rows(key))


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
