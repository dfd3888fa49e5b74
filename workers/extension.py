"""The extension: one object that joins a Celery app to its database."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from celery import Celery, Signature, Task
from celery.result import AsyncResult, GroupResult
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, scoped_session

from ..strategies.asynchronous.units import AsyncBlock
from ..strategies.engines import forks
from ..strategies.engines.factory import EngineListener
from ..strategies.engines.leaks import find_origin
from ..strategies.engines.succession import Succession
from ..strategies.errors import CeleryAlchemyError
from ..strategies.features.following import follow
from ..strategies.features.foreign_sessions import (
    belongs_to_unit,
    check_session,
    expect_rollback,
    on_commit_of,
    refuse_coroutine,
)
from ..strategies.features.read_only import ReadOnly
from ..strategies.session_factory import MakeSession
from . import apps
from .async_sessions import async_session_of
from .database import Database
from .databases import Databases, databases_of
from .decorating import TaskDecorator, task_decorator
from .errors import ConfigurationError
from .exactly_once import public
from .sending import canvas
from .sending.attach import attach as attach_sending
from .sending.following import session_to_wait_for
from .session_proxies import proxy_to
from .settings import DEFAULT
from .sharing import share
from .starting import attach as starting
from .testing.one_transaction import one_transaction

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

#: What can be sent: a signature, chain, group or chord; a task of any class; the name of a task.
Sendable: TypeAlias = "Signature[Any] | Task[..., Any] | str"
Hook = TypeVar("Hook", bound=Callable[..., Any])
Followed = TypeVar("Followed")

PUBLIC = (
    *("app", "apply_async_on_commit", "async_engine", "async_session", "async_unit_of_work", "database", "databases"),
    *("delay_on_commit", "dispose", "engine", "follow", "forget", "idempotency_key", "in_unit_of_work", "init_app"),
    *("on_commit", "on_engine", "one_transaction", "session", "share", "strategy", "task", "unit_of_work"),
)
"""The names of an Alchemy that are for users; the others are for workers."""


class Alchemy(Database):
    """SQLAlchemy sessions for the tasks of a Celery app::

        app = Celery("shop", broker="redis://localhost")
        app.conf.alchemy_database_url = "postgresql+psycopg://localhost/shop"
        db = Alchemy(app)

    Nothing is read, checked or connected here: the settings are read when a worker starts, or at first use outside one.

    Args:
        app: The Celery app; or leave it out and call `init_app`.
        engine: Your own Engine, used instead of `alchemy_database_url`. Its listeners and its size stay; its connection
            pool is made anew where a fork or a monkey patch makes that necessary.
        session_factory: A `sessionmaker`, a Session class, or a callable that takes Session's keyword arguments.
        database: The name of the database, where an app has several; `self.db` and `db.session` are of "default".
    """

    def __init__(
        self,
        app: Celery | None = None,
        *,
        engine: Engine | None = None,
        session_factory: MakeSession | None = None,
        database: str = DEFAULT,
    ) -> None:
        if not isinstance(database, str) or not database:
            raise ConfigurationError(f"Alchemy(database={database!r}): the name of a database is a string.")
        super().__init__(engine, session_factory, database)
        self._session = proxy_to(self.units)
        self.shared: list[scoped_session[Any]] = []
        """The web application's scoped_sessions whose transactions messages wait for outside a unit of work."""
        # Not at first use: what the user's code connects until then must not cross a fork either.
        forks.guard_everything()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Celery) -> None:
        """Serve `app`. Adds `--session-strategy` to its `worker` command and a bootstep to its workers.

        Called again with another app (an application factory in tests), it serves that one from then on.
        """
        apps.register(app, self)
        if self.app is not None and self.app is not app:
            self.stop()
            apps.unregister(self.app, self)
            self.succession: Succession = Succession()
        self.app: Celery | None = app
        self._settings = self._engines = None
        forks.on_fork(self.after_fork)
        starting.attach(app)

    # -- Session and Engine ------------------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """Proxy to the Session of the unit of work now running in this thread or greenlet.

        May be kept in a variable and used anywhere down the call stack; it is a `scoped_session`, so `db.session()`
        returns the Session itself. Using it raises `NoUnitOfWork` where no unit of work is open.
        """
        return cast(Session, self._session)

    @property
    def engine(self) -> Engine:
        """This process's Engine; it connects with its first statement.

        Under `per_process` the worker's main process and each pool process have one of their own. Listeners and
        execution options that you put on it follow to the next one.
        """
        return self.strategy.engine

    @property
    def async_session(self) -> AsyncSession:
        """The AsyncSession of the unit of work that runs in this coroutine: of an `async def` task, or of an
        `async_unit_of_work()` block. Ask for it where it is used; it is not to be kept.

        Raises:
            NoUnitOfWork: this coroutine has no unit of work.
        """
        return async_session_of(self, "db.async_session")

    @property
    def async_engine(self) -> AsyncEngine:
        """The AsyncEngine of the running event loop; it connects with its first statement.

        Raises:
            CeleryAlchemyError: no event loop runs in this thread.
        """
        return self.coroutines.strategy.async_engine

    @property
    def databases(self) -> Databases:
        """The Alchemy of each database of the app, by its name: the default, those of `alchemy_databases`, and those
        made with `Alchemy(app, database=...)`. Each has a Session, an Engine and a strategy of its own.

        In a task, and in a `unit_of_work()` of the default database, `db.databases["reports"].session` belongs to the
        same unit of work: it is committed, rolled back and released with it.
        """
        return databases_of(self)

    def count_databases(self) -> int:
        """Return how many databases the app has."""
        return len(self.databases)

    @property
    def in_unit_of_work(self) -> bool:
        """Whether `db.session` can be used here: this thread or greenlet runs a task or a `unit_of_work()` block."""
        return self.units.is_open()

    def share(self, sessions: scoped_session[Any]) -> None:
        """Let `sessions`, a web application's `scoped_session`, be the Session of the unit of work where one is open.

        So the models and helpers that use it work in tasks as they do in requests (Flask-SQLAlchemy's `db.session`,
        `Model.query`). Elsewhere it stays what it is, and what is sent "on commit" there waits for its COMMIT. In a
        task its `remove()` does nothing.
        """
        share(self.units, sessions)
        if sessions not in self.shared:
            self.shared.append(sessions)

    def follow(self, session: Followed) -> follow[Followed]:
        """Let what the block sends "on commit" wait for the COMMIT of `session`: `with db.follow(session):`.

        For web requests and other code that owns its Session. `delay_on_commit`, `on_commit()` and, with
        `alchemy_enqueue_on_commit`, `delay()` in the block and in what it calls, awaits and starts wait for that
        Session, where no unit of work is open. Its rollback drops them. The block may end before the COMMIT: what waits
        goes on waiting.

        Args:
            session: A Session, a `scoped_session` or an AsyncSession.
        Returns:
            A context manager that gives `session`.
        Raises:
            CeleryAlchemyError: it is none of these; or a unit of work is open here, whose COMMIT messages wait for.
        """
        check_session(session)
        if self.units.is_open() and not belongs_to_unit(session):
            raise CeleryAlchemyError(
                "db.follow() inside a unit of work has no effect: what is sent there waits for the COMMIT of the unit "
                "of work. Pass session= to the calls that are to wait for another one."
            )
        return follow(session, find_origin(), expect_rollback)

    def on_engine(self, listener: EngineListener) -> EngineListener:
        """Run `listener(engine)` once for every Engine of this process: for one that is made later, before its first
        connection; for one that is in use already, now.

        The place for listeners (tokens, search_path, tracing): `per_process` makes an Engine in every pool process, and
        tasks that only read have one of their own. An Engine that stays over a fork is not given to it again in the
        child. May be used as a decorator.
        """
        self._listeners.append(listener)
        if self._engines is not None:
            self._engines.on_engine(listener)
        if self.coroutines.started is not None:
            self.coroutines.started.engines.on_engine(listener)
        return listener

    def dispose(self) -> None:
        """Close the connections that this process keeps open and nobody uses; the next statement connects anew.

        What is in use is closed when it comes back. The connections of coroutines are closed on their event loops; in a
        coroutine this only begins, and `await db.async_engine.dispose()` waits for the end.
        """
        for strategy in {self._strategy, self.coroutines.started}:
            if strategy is not None:
                strategy.dispose()

    @property
    def task(self) -> TaskDecorator:
        """Decorator that makes a function a DatabaseTask, and an `async def` function an AsyncDatabaseTask: Celery's
        `app.task(base=...)`, typed::

            @db.task
            def create(self: DatabaseTask, name: str) -> int: ...

            @db.task(acks_late=True, read_only=True)
            def count(session: CurrentSession, name: str) -> int: ...

        A first parameter called `self` receives the task, so `bind=True` is left out. Type checkers that find
        celery-types know the arguments of `delay`, `delay_on_commit` and of a call, and the type of the result; a
        Session that is injected is left out of them where it comes first. Options are those of `app.task`. Where the
        Alchemy has no app yet, the task is made as by `shared_task`.

        Raises:
            ConfigurationError: `base` is neither of the two, nor below one; or this Alchemy is not that of the default
                database.
        """
        return task_decorator(self.app, self.database)

    @property
    def idempotency_key(self) -> str:
        """A key for a provider of mail or payments: the same whenever this task is delivered again, or retried.

        What is outside the database is not undone with its transaction, and may be done again: a provider that takes a
        key does it once. The key is of the task's id; a task with another id has another one.

        Raises:
            NoUnitOfWork: no task runs in this thread or greenlet.
        """
        return public.idempotency_key()

    def forget(self, task_id: str) -> int:
        """Forget that the task with this id has completed (`exactly_once`), so that it can run again.

        Returns:
            How many rows there were: 0 where it was not recorded.
        """
        return public.forget(self, task_id)

    # -- units of work -----------------------------------------------------------------------------------------------

    def unit_of_work(self, *, commit: bool = True, read_only: ReadOnly = False) -> AbstractContextManager[Session]:
        """Open a Session of its own, and end its transaction when the block ends: the rules of a task, anywhere else.

        Inside a task or another block it is a transaction apart: the outer Session is untouched. Of the default
        database it is one unit of work over all databases; of another one, over that alone.

        Args:
            commit: Commit when the block returns; False rolls back. A block that raises is always rolled back.
            read_only: True: no transaction, and no writing; "transaction": one that may not write. As of a task.
        Yields:
            A Session of this thread or greenlet; not valid after the block.
        Raises:
            sqlalchemy.exc.TimeoutError: no connection became free within the Engine's `pool_timeout` (seconds).
            BrokenTransaction: a database error was caught in the block and nobody rolled back.
        """
        caller = sys._getframe(1)  # named in messages; nothing is decided by it
        return self.units.open((caller.f_code, caller.f_lineno), commits=commit, kind="block", read_only=read_only)

    def async_unit_of_work(self, *, commit: bool = True, read_only: ReadOnly = False) -> AsyncBlock:
        """Open an AsyncSession of its own, and end its transaction when the block ends: `unit_of_work` for coroutines::

            async with db.async_unit_of_work() as session: ...

        Also for the coroutines that a task starts, which must not share its Session.

        Args:
            commit: Commit when the block returns; False rolls back. A block that raises is always rolled back.
            read_only: True: no transaction, and no writing; "transaction": one that may not write. As of a task.
        """
        caller = sys._getframe(1)  # named in messages; nothing is decided by it
        units = self.coroutines.units
        units.started()
        options = units.block_options(commit, read_only)
        return units.open_async((caller.f_code, caller.f_lineno), options=options, kind="block")

    def on_commit(self, callback: Hook, *, session: Any = None, raises: bool = False) -> Hook:
        """Run `callback()` after the next real COMMIT of the current unit of work, its connection given back.

        Dropped when the transaction, or the savepoint it was registered in, is rolled back. A unit of work that ends
        well without a transaction runs it at its end; there it has a unit of work of its own. Outside any unit of work
        it waits for the Session of a `follow()` block, or else of a shared `scoped_session`; where there is none,
        `alchemy_on_commit_outside` decides. Under an AsyncSession it runs in a thread, and `await session.commit()`
        waits for it; an `async def` function is awaited. What it raises is logged and undoes nothing. May be used as a
        decorator.

        Args:
            session: Wait for the COMMIT of this Session instead, which somebody else opened and will commit: a web
                application's Session, its `scoped_session` or AsyncSession.
            raises: What `callback` raises is raised to whoever commits, once all others have run. The transaction is
                committed all the same; in a task that means a failed task whose work is done.
        """
        canvas.refuse_signature(callback)
        if session is not None:
            on_commit_of(session, callback, raises=raises)
        elif self.units.is_open():
            unit = self.units.current()
            if not unit.awaits:
                refuse_coroutine(callback)
            unit.on_commit(callback, raises=raises)
        elif self.app is not None and (found := session_to_wait_for(self.app, "db.on_commit()", self)) is not None:
            on_commit_of(found, callback, raises=raises)
        else:
            refuse_coroutine(callback)
            callback()
        return callback

    def delay_on_commit(self, what: Sendable, *args: Any, **kwargs: Any) -> AsyncResult[Any] | GroupResult:
        """Send `what` after the COMMIT of the current unit of work: `apply_async_on_commit` in the star form."""
        return self.apply_async_on_commit(what, args, kwargs)

    def apply_async_on_commit(
        self,
        what: Sendable,
        args: Any = None,
        kwargs: Any = None,
        *,
        session: Any = None,
        raises: bool = False,
        **options: Any,
    ) -> AsyncResult[Any] | GroupResult:
        """Send a canvas after the next real COMMIT, as `DatabaseTask.apply_async_on_commit` sends a task.

        Args:
            what: A signature, a chain, group or chord; a task of any class; the name of a task.
            args: Of its first task, or of each task of a group, before those that it has.
            kwargs: The same.
            session: Wait for the COMMIT of this Session instead: a web application's Session, its `scoped_session` or
                AsyncSession.
            raises: Raise the broker's error to whoever commits, the transaction being committed all the same.
            options: Of `apply_async`.

        Returns:
            An AsyncResult or a GroupResult, as `apply_async` of `what` does, with the ids that the tasks will have.
        """
        return canvas.apply_async_on_commit(self, what, args, kwargs, session=session, raises=raises, options=options)

    @contextmanager
    def one_transaction(self) -> Iterator[Session]:
        """For tests: let everything until the end of the block happen in one transaction, which is then rolled back.

        Each unit of work joins it with a savepoint: tasks run eagerly or by a worker in a thread of this process,
        nested ones, `unit_of_work()`. What they commit is seen by all of them. Outside of tasks `db.session` is the
        Session that the block yields. One thing at a time, in whatever thread; what connects by `db.engine` stays
        outside.

        Yields:
            A Session for the test itself, on the default database.
        """
        with one_transaction(self) as session:
            yield session

    def attach(self, app: Celery) -> None:
        """Let what `app` sends wait for a COMMIT: a spawned pool process has a second app object."""
        attach_sending(app)

    def __dir__(self) -> list[str]:
        """Return the public names, for completion: without what Database keeps for workers."""
        return [*PUBLIC, *(name for name in super().__dir__() if name.startswith("_"))]

    def __repr__(self) -> str:
        strategy = self._strategy.name if self._strategy is not None else "not started"
        database = f" database {self.database!r}," if self.database != DEFAULT else ""
        return f"<Alchemy of {self.app!r},{database} strategy {strategy}, pid {os.getpid()}>"
