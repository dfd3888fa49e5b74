"""The extension: one object that joins a Celery app to its database."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

from celery import Celery
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, scoped_session

from ..strategies.engines import forks
from ..strategies.engines.factory import EngineListener
from ..strategies.features.foreign_sessions import on_commit_of
from ..strategies.features.read_only import ReadOnly
from ..strategies.sessions import MakeSession, SessionFactory
from . import apps
from .database import Database
from .databases import Databases, databases_of
from .errors import ConfigurationError
from .sending import enqueue
from .session_proxies import proxy_to
from .settings import DEFAULT
from .sharing import share
from .starting import attach as starting
from .testing.one_transaction import one_transaction

Hook = TypeVar("Hook", bound=Callable[..., Any])


class Alchemy(Database):
    """SQLAlchemy sessions for the tasks of a Celery app.

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
        sessions = SessionFactory(session_factory, {})
        for known in (engine, sessions.bind, *sessions.binds):
            if isinstance(known, Engine):
                # Not at first use: what the user's code connects until then must not cross a fork either.
                forks.guard(known)
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
        self.app = app
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
        """This process's Engine; it connects with its first statement."""
        return self.strategy.engine

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
        `Model.query`). Elsewhere it stays what it is. In a task its `remove()` does nothing.
        """
        share(self.units, sessions)

    def on_engine(self, listener: EngineListener) -> EngineListener:
        """Run `listener(engine)` for every Engine made, in the process that made it, before its first connection.

        The place for listeners (tokens, search_path, tracing): `per_process` makes an Engine in every pool process.
        May be used as a decorator.
        """
        self._listeners.append(listener)
        if self._engines is not None:
            self._engines.on_engine(listener)
        return listener

    def dispose(self) -> None:
        """Close the connections that this process keeps open and nobody uses; the next statement connects anew."""
        if self._strategy is not None:
            self._strategy.dispose()

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

    def on_commit(self, callback: Hook, *, session: Any = None, raises: bool = False) -> Hook:
        """Run `callback()` after the next real COMMIT of the current unit of work, its connection given back.

        Dropped when the transaction, or the savepoint it was registered in, is rolled back. A unit of work that ends
        well without a transaction runs it at its end; outside any unit of work it runs at once. It has a unit of work
        of its own; what it raises is logged and undoes nothing. May be used as a decorator.

        Args:
            session: Wait for the COMMIT of this Session instead, which somebody else opened and will commit: a web
                application's Session, its `scoped_session` or AsyncSession.
            raises: What `callback` raises is raised to whoever commits, once all others have run. The transaction is
                committed all the same; in a task that means a failed task whose work is done.
        """
        if session is not None:
            on_commit_of(session, callback, raises=raises)
        elif (entry := self.units.current_entry()) is not None:
            self.units.unit_of(entry).on_commit(callback, raises=raises)
        else:
            callback()
        return callback

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
        enqueue.attach(app)

    def __repr__(self) -> str:
        strategy = self._strategy.name if self._strategy is not None else "not started"
        database = f" database {self.database!r}," if self.database != DEFAULT else ""
        return f"<Alchemy of {self.app!r},{database} strategy {strategy}, pid {os.getpid()}>"
