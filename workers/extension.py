"""The extension: one object that joins a Celery app to its database."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from celery import Celery
from sqlalchemy.engine import Dialect, Engine
from sqlalchemy.orm import Session, scoped_session

from ..strategies import SessionStrategy, WorkerPool, forks, green, statement_timeout
from ..strategies.drivers import parse_url
from ..strategies.engines import EngineListener, EngineSource
from ..strategies.foreign import on_commit_of
from ..strategies.read_only import ReadOnly
from ..strategies.sessions import SessionFactory, SessionSource
from ..strategies.terms import Terms
from ..strategies.two_phase import can_prepare
from ..strategies.units import RunningScope, UnitsOfWork, place
from ..strategies.units import observe_error as observe
from ..strategies.worker_pool import outside_worker
from . import apps, lifecycle, selection
from .databases import Databases, databases_of
from .errors import ConfigurationError, as_configuration_error
from .proxy import proxy_to
from .settings import DEFAULT, Settings, read_settings
from .sharing import share
from .testing import one_transaction

logger = logging.getLogger(__name__)

Hook = TypeVar("Hook", bound=Callable[..., Any])


class Alchemy:
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
        session_factory: SessionFactory | None = None,
        database: str = DEFAULT,
    ) -> None:
        if not isinstance(database, str) or not database:
            raise ConfigurationError(f"Alchemy(database={database!r}): the name of a database is a string.")
        self.app: Celery | None = None
        self.database = database
        self.units = UnitsOfWork(lambda: self.strategy)
        self._given_engine = engine
        self.session_factory = session_factory
        self._listeners: list[EngineListener] = []
        self._engines: EngineSource | None = None
        self._settings: Settings | None = None
        self._strategy: SessionStrategy | None = None
        self.pinned: SessionStrategy | None = None
        """In force whatever else was chosen: a test's."""
        self.lock = threading.RLock()
        self._session = proxy_to(self.units)
        sessions = SessionSource(session_factory, {})
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
        forks.on_fork(self._after_fork)
        lifecycle.attach(app)

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
    def strategy(self) -> SessionStrategy:
        """The SessionStrategy in force; outside a worker the one chosen for the worker pool `none`.

        Raises:
            ConfigurationError: the settings do not say enough, or something that cannot work.
        """
        strategy = self.pinned or self._strategy
        if strategy is None:
            with self.lock:
                strategy = self._strategy or self._start(self._worker_pool(), None)
        return strategy

    def _worker_pool(self) -> WorkerPool:
        """Return the worker pool of the default database: this one was first used after the worker's start."""
        leader = apps.find(self.app) if self.app is not None else None
        if leader is None or leader._strategy is None:
            return outside_worker()
        return leader._strategy.worker_pool

    @property
    def databases(self) -> Databases:
        """The Alchemy of each database of the app, by its name: the default, those of `alchemy_databases`, and those
        made with `Alchemy(app, database=...)`. Each has a Session, an Engine and a strategy of its own.

        In a task, and in a `unit_of_work()` of the default database, `db.databases["reports"].session` belongs to the
        same unit of work: it is committed, rolled back and released with it.
        """
        return databases_of(self)

    @property
    def settings(self) -> Settings:
        """The settings of the app, read and checked at first use."""
        settings = self._settings
        if settings is None:
            if self.app is None:
                raise ConfigurationError(
                    "This Alchemy has no app yet. Write `Alchemy(app)`, or call `db.init_app(app)`."
                )
            settings = self._settings = read_settings(self.app).of(self.database)
        return settings

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

    @contextmanager
    def unit_of_work(self, *, commit: bool = True, read_only: ReadOnly = False) -> Iterator[Session]:
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
        label = f"unit_of_work() at {place(3)}"
        with self.units.open(label, commits=commit, kind="block", read_only=read_only) as unit:
            yield unit.session

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
        elif (frame := self.units.current_frame()) is not None:
            self.units.unit_of(frame).on_commit(callback, raises=raises)
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

    # -- lifecycle ---------------------------------------------------------------------------------------------------

    def start_worker(self, worker_pool: WorkerPool, strategy_name: str | None = None) -> SessionStrategy:
        """Choose and prepare the strategy for `worker_pool`, connecting to nothing; called by the bootstep.

        Raises:
            ConfigurationError: a setting is missing, unknown or of no use.
        """
        if self.pinned is not None:
            return self.pinned
        with self.lock:
            self._settings = None  # read again: the configuration may have changed since the module was imported
            return self._start(worker_pool, strategy_name)

    def start_spawned(self, worker_pool: WorkerPool, strategy_name: str | None) -> None:
        """Take over, in a spawned pool process, what the main process decided."""
        if self._strategy is None or self._strategy.worker_pool.main_pid != worker_pool.main_pid:
            self.start_worker(worker_pool, strategy_name)

    def stop(self) -> None:
        """Close idle connections and forget the strategy: the worker, or this process's part of it, is over."""
        if self.pinned is not None:
            return  # a test's worker ends, and the test goes on
        strategy, self._strategy = self._strategy, None
        if strategy is not None:
            strategy.dispose()

    def close_before_fork(self) -> None:
        """Close idle connections: the main process is about to fork a pool process."""
        if self._strategy is not None and self._strategy.worker_pool.in_main_process:
            self._strategy.dispose()

    def _start(self, worker_pool: WorkerPool, strategy_name: str | None) -> SessionStrategy:
        with as_configuration_error():
            settings = self.settings
            sessions = SessionSource(self.session_factory, settings.session_options)
            engines = self._engine_source(settings, sessions)
            if engines.terms.two_phase:
                sessions.use_two_phase()
            strategy_class, reason = selection.choose(settings.session_strategy, strategy_name, worker_pool)
            for url in filter(None, (engines.url, engines.replica_url)):
                green.prepare(worker_pool, url)
            strategy = strategy_class(engines, sessions, worker_pool, reason)
            strategy.start()
        previous, self._strategy = self._strategy, strategy
        if previous is not None and previous._engine is not strategy._engine:
            previous.dispose()
        return strategy

    def _engine_source(self, settings: Settings, sessions: SessionSource) -> EngineSource:
        given = self._given_engine or (sessions.bind if settings.database_url is None else None)
        if given is not None and not isinstance(given, Engine):
            raise ConfigurationError(
                f"Alchemy(engine=...) got a {type(given).__name__}, but tasks are ordinary functions and need a "
                f"sqlalchemy.Engine, made by create_engine() with a sync driver."
            )
        url = None
        if given is None:
            if settings.database_url is None or settings.database_url == "":
                raise ConfigurationError(self._no_database())
            url = parse_url(settings.database_url, self._spelled("url", "alchemy_database_url"))
        elif given.dialect.is_async:
            raise ConfigurationError(
                "Alchemy(engine=...) got the Engine inside an AsyncEngine. Tasks are ordinary functions and need an "
                "Engine made by create_engine() with a sync driver."
            )
        replica = settings.replica_database_url
        replica_url = (
            parse_url(replica, self._spelled("replica_url", "alchemy_replica_database_url")) if replica else None
        )
        terms = self._terms(settings, (url or given.url).get_dialect())  # type: ignore[union-attr]
        kept = self._engines
        if (
            kept is not None
            and (kept.given, kept.terms) == (given, terms)
            and (given or (kept.url, kept.options, kept.replica_url) == (url, settings.engine_options, replica_url))
        ):
            return kept
        engines = EngineSource(url, settings.engine_options, given, RunningScope(), observe, replica_url, terms)
        for listener in self._listeners:
            engines.on_engine(listener)
        self._engines = engines
        return engines

    def _terms(self, settings: Settings, dialect: type[Dialect]) -> Terms:
        count = len(self.databases)
        limit_s = settings.statement_timeout_s
        if limit_s is not None and not statement_timeout.supports(dialect):
            raise ConfigurationError(
                f"alchemy_statement_timeout_s={limit_s!r}, but the database {self.database!r} is "
                f"{dialect.name}, which stops no statement by itself; {', '.join(statement_timeout.SUPPORTED)} do. "
                f"Leave it out."
            )
        if settings.external_pooler and dialect.name != "postgresql":
            raise ConfigurationError(
                f"alchemy_external_pooler={settings.external_pooler!r}, but the database {self.database!r} is "
                f"{dialect.name}: PgBouncer is for PostgreSQL. Leave it out."
            )
        return Terms(
            database=self.database,
            databases=count,
            two_phase=settings.two_phase and count > 1 and can_prepare(dialect),
            statement_timeout_s=limit_s,
            application_name=settings.application_name,
            external_pooler=settings.external_pooler is not None,
            begin_with_first_statement=settings.begin_with_first_statement,
        )

    def _spelled(self, key: str, setting: str) -> str:
        return setting if self.database == DEFAULT else f"alchemy_databases[{self.database!r}][{key!r}]"

    def _no_database(self) -> str:
        if self.database == DEFAULT:
            return (
                "No database: set app.conf.alchemy_database_url, for example to "
                "'postgresql+psycopg://localhost/shop', or bring an Engine with Alchemy(app, engine=engine)."
            )
        return (
            f"No URL for the database {self.database!r}: put it into app.conf.alchemy_databases, for example "
            f"{{{self.database!r}: 'postgresql+psycopg://localhost/{self.database}'}}, or bring an Engine with "
            f"Alchemy(app, database={self.database!r}, engine=engine)."
        )

    def _after_fork(self) -> None:
        # The thread that held the lock in the parent is not in this process to release it.
        self.lock = threading.RLock()

    def __repr__(self) -> str:
        strategy = self._strategy.name if self._strategy is not None else "not started"
        database = f" database {self.database!r}," if self.database != DEFAULT else ""
        return f"<Alchemy of {self.app!r},{database} strategy {strategy}, pid {os.getpid()}>"
