"""The task class of coroutines: `self.db` is the AsyncSession of this task request."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

from sqlalchemy.ext.asyncio import AsyncSession

from ..strategies.errors import CeleryAlchemyError
from ..strategies.place import current_coroutine
from ..strategies.scope import runs_in_greenlet
from . import apps, databases
from .async_request import refuse_in_coroutine
from .async_sessions import async_session_of
from .errors import ConfigurationError
from .injection import UseDatabase
from .task import BaseDatabaseTask

CurrentAsyncSession = Annotated[AsyncSession, UseDatabase()]
"""Annotation of a parameter of an `async def` task that receives the AsyncSession of the task request:

    @app.task(base=AsyncDatabaseTask)
    async def create(name: str, session: CurrentAsyncSession) -> int: ...

Callers do not see it, as they do not see `CurrentSession`."""


class AsyncDatabaseTask(BaseDatabaseTask):
    """Task that is an `async def` function, and whose `self.db` is the AsyncSession of the request that is running::

        @app.task(base=AsyncDatabaseTask, bind=True)
        async def create(self: AsyncDatabaseTask, name: str):
            self.db.add(User(name=name))
            await self.db.flush()

    It ends as a DatabaseTask does. A soft time limit is raised at the `await`, a COMMIT is never interrupted. Runs on
    the event loop of the worker pool `asyncio`; under prefork, threads and solo on one of the process's own.
    """

    abstract = True
    is_async = True

    @property
    def db(self) -> AsyncSession:
        """The AsyncSession of the task request that runs here, opened on first use.

        Raises:
            NoUnitOfWork: this coroutine or thread runs no request, for example because the task started it.
            ConfigurationError: the app has no Alchemy.
        """
        return async_session_of(apps.get(self.app), f"self.db of {self.name}", self)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Run this task here and now, as Celery does.

        Raises:
            ConfigurationError: a coroutine calls it that cannot wait: a child of a task's, or a web request.
        """
        refuse_in_coroutine(self)
        return super().apply(*args, **kwargs)

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Roll back, give the connection back, then retry, as any DatabaseTask does.

        Raises:
            CeleryAlchemyError: a child coroutine asks for it, which cannot wait for the ROLLBACK of its task.
        """
        request = self.request_stack.top
        is_called = request is None or request.called_directly
        if not is_called and current_coroutine() is not None and not runs_in_greenlet():
            raise CeleryAlchemyError(
                f"{self.name}.retry() was called in a coroutine that the task has started. The next attempt would "
                f"begin before this one is rolled back. Let the error reach the task's own coroutine, and retry there."
            )
        return super().retry(*args, **kwargs)

    def session_for(self, database: str) -> AsyncSession:
        """Return the AsyncSession of this task request on another database of the app; `self.db` is of "default".

        Raises:
            NoUnitOfWork: as `db` does.
            ConfigurationError: the app has no such database.
        """
        db = databases.database(apps.get(self.app), database)
        return async_session_of(db, f"session_for({database!r}) of {self.name}", self)

    @classmethod
    def refuse_function(cls, run: Any) -> None:
        function = inspect.unwrap(getattr(run, "__func__", run))
        if not inspect.iscoroutinefunction(function):
            raise ConfigurationError(
                f"The task {cls.name or cls.__name__!r} is no `async def` function, which an AsyncDatabaseTask awaits. "
                f"Write `async def`, or make it a DatabaseTask (base=DatabaseTask), whose `self.db` is a Session."
            )
