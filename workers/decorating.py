"""`@db.task`: Celery's own `app.task` with DatabaseTask or AsyncDatabaseTask as its base, and the types of what it
makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload

from celery import Celery, shared_task
from celery.result import AsyncResult
from sqlalchemy.orm import Session

from .errors import ConfigurationError
from .settings import DEFAULT
from .task import BaseDatabaseTask, DatabaseTask

P = ParamSpec("P")
R = TypeVar("R")

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from .async_task import AsyncDatabaseTask

    class DefinedTask(DatabaseTask, Generic[P, R]):
        """What a type checker knows of a DatabaseTask that `@db.task` has made of a function."""

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
        def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]: ...
        def delay_on_commit(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]: ...

    class DefinedAsyncTask(AsyncDatabaseTask, Generic[P, R]):
        """The same of an AsyncDatabaseTask: a call gives its coroutine."""

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]: ...
        def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]: ...
        def delay_on_commit(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]: ...


class Decorate(Protocol):
    """Makes a task of a function. Callers pass neither the task nor a Session that comes first."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[AsyncDatabaseTask, AsyncSession, P], Coroutine[Any, Any, R]], /
    ) -> DefinedAsyncTask[P, R]: ...
    @overload
    def __call__(
        self, function: Callable[Concatenate[AsyncDatabaseTask, P], Coroutine[Any, Any, R]], /
    ) -> DefinedAsyncTask[P, R]: ...
    @overload
    def __call__(
        self, function: Callable[Concatenate[AsyncSession, P], Coroutine[Any, Any, R]], /
    ) -> DefinedAsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[DatabaseTask, Session, P], R], /) -> DefinedTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[DatabaseTask, P], R], /) -> DefinedTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Session, P], R], /) -> DefinedTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> DefinedAsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> DefinedTask[P, R]: ...


class TaskDecorator(Protocol):
    """The same, to be called with options of `app.task` too."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[AsyncDatabaseTask, AsyncSession, P], Coroutine[Any, Any, R]], /
    ) -> DefinedAsyncTask[P, R]: ...
    @overload
    def __call__(
        self, function: Callable[Concatenate[AsyncDatabaseTask, P], Coroutine[Any, Any, R]], /
    ) -> DefinedAsyncTask[P, R]: ...
    @overload
    def __call__(
        self, function: Callable[Concatenate[AsyncSession, P], Coroutine[Any, Any, R]], /
    ) -> DefinedAsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[DatabaseTask, Session, P], R], /) -> DefinedTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[DatabaseTask, P], R], /) -> DefinedTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Session, P], R], /) -> DefinedTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> DefinedAsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> DefinedTask[P, R]: ...
    @overload
    def __call__(self, /, **options: Any) -> Decorate: ...


def task_decorator(app: Celery | None, database: str) -> TaskDecorator:
    """Return what `db.task` is, for the app of a database.

    Args:
        app: None: the task is made as by `shared_task`, for the apps that there are and will be.
        database: The name of the database.
    """

    def decorate(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        if database != DEFAULT:
            raise ConfigurationError(
                f"task() of the database {database!r}: `self.db` of a task is of the default database. Use @db.task of "
                f"that one, and `self.session_for({database!r})` in the task."
            )
        base = options.get("base", DatabaseTask)
        if not isinstance(base, type) or not issubclass(base, BaseDatabaseTask):
            raise ConfigurationError(
                f"@db.task(base={base!r}): the base must be DatabaseTask, AsyncDatabaseTask or a class below one."
            )
        make = shared_task if app is None else app.task

        def define(function: Callable[..., Any]) -> Any:
            return make(**{"bind": _takes_task(function), "base": _base_for(function)} | options)(function)

        return define if function is None else define(function)

    return decorate


def _base_for(function: Any) -> type[BaseDatabaseTask]:
    if not inspect.iscoroutinefunction(inspect.unwrap(function)):
        return DatabaseTask
    from .async_task import AsyncDatabaseTask

    return AsyncDatabaseTask


def _takes_task(function: Callable[..., Any]) -> bool:
    """Tell whether the first parameter is called `self`: it receives the task, as with `bind=True`."""
    return next(iter(inspect.signature(function).parameters), None) == "self"
