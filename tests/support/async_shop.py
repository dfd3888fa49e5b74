"""A small application with `async def` tasks, a broker in memory, and PostgreSQL."""

import uuid
from collections.abc import Callable
from typing import Any

from celery import Celery

from celery_alchemy import (
    Alchemy,
    AsyncDatabaseTask,
)
from support.project.models import Row

Start = Callable[..., Any]


class Shop:
    """An app with a broker in memory and PostgreSQL."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.app.conf.update(alchemy_database_url=url, alchemy_engine_options={"pool_size": 2}, **settings)
        self.db = Alchemy(self.app)

    def run(self, body: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run `body` as a task that takes itself first; return its result or raise its error."""
        return self.task(body, **options).apply(args, throw=True).result

    def task(self, body: Callable[..., Any], base: Any = AsyncDatabaseTask, **options: Any) -> Any:
        return self.app.task(base=base, bind=True, shared=False, **{"name": uuid.uuid4().hex, **options})(body)


async def add(task: Any, key: str, note: str = "added") -> None:
    task.db.add(Row(key=key, note=note))
    await task.db.flush()
