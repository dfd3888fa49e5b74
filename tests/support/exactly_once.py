"""Deliveries of tasks with `exactly_once`: Celery's own tracer runs them, without a broker between."""

import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from celery.app.trace import build_tracer
from sqlalchemy import text

from celery_alchemy import Alchemy
from support.apps import make_app
from support.databases import Database

TABLE = "celery_alchemy_completed"


class Once:
    """An app whose tasks are delivered by hand, as often as a test wants."""

    def __init__(self, database: Database, **changes: Any) -> None:
        self.database = database
        changes = {"alchemy_database_url": database.url("once"), "result_backend": "cache+memory://", **changes}
        self.app, self.db = make_app(None, changes=changes)
        assert isinstance(self.db, Alchemy)

    def deliver(
        self, task: Any, *args: Any, task_id: str, redelivered: bool = False, **request: Any
    ) -> tuple[str, Any]:
        """Run `task` as a worker does; return its state and its result."""
        info = {"redelivered": redelivered, "priority": None}
        request = {"id": task_id, "task": task.name, "delivery_info": info, "is_eager": False, **request}
        tracer = build_tracer(task.name, task, app=self.app, propagate=False)
        retval, info_, *_ = tracer(task_id, args, request.pop("kwargs", {}), request)
        return (info_.state, info_.retval) if info_ is not None else ("SUCCESS", retval)

    def at_once(self, task: Any, *args: Any, task_id: str, copies: int = 2, **request: Any) -> Sequence[Any]:
        """Deliver copies at the same moment, each in a thread of its own."""
        self.app.finalize()
        task = self.app.tasks[task.name]  # Celery binds a task at its first use, which is not safe for threads
        return together([lambda: self.deliver(task, *args, task_id=task_id, **request)] * copies)

    def recorded(self, task_id: str) -> list[tuple[Any, ...]]:
        """Return the rows of a task: nesting, content type, result, note."""
        sql = f"SELECT nesting, content_type, result, note FROM {TABLE} WHERE task_id = :i ORDER BY nesting"
        with self.database.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(sql), {"i": task_id})]

    def close(self) -> None:
        self.db.stop()
        self.app.close()


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Call all at the same moment; return what they return, or raise."""
    barrier, found = threading.Barrier(len(calls)), [None] * len(calls)

    def call(number: int) -> None:
        barrier.wait(20)
        try:
            found[number] = calls[number]()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    errors = [one for one in found if isinstance(one, BaseException)]
    if errors:
        raise errors[0]
    return found


def new_id() -> str:
    return uuid.uuid4().hex
