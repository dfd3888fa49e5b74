"""One database of an app at run time: its settings, the strategy in force, its units of work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from celery import Celery
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import Session

from ..strategies import SessionStrategy, WorkerPool
from ..strategies.asynchronous.strategy import PerLoopStrategy
from ..strategies.asynchronous.units import AsyncUnitOfWork
from ..strategies.deferring import DeferringUnit
from ..strategies.deferring_sessions import hold_limits_in_commits
from ..strategies.drivers import green
from ..strategies.drivers.awaited_urls import has_sync_side, sync_url
from ..strategies.drivers.url import parse_url, shown, shown_text
from ..strategies.engines.factory import EngineFactory, EngineHook, EngineListener
from ..strategies.engines.pool import DeferringQueuePool, MeteredQueuePool, ReservedQueuePool
from ..strategies.engines.succession import Succession
from ..strategies.entry import UnitOptions
from ..strategies.features.choice import ENGINE_HOOKS, phrases, unit_options
from ..strategies.features.read_only import ReadOnly
from ..strategies.hooks import UnitHook
from ..strategies.options import DatabaseOptions
from ..strategies.registry import UnitOfWorkRegistry, observe_error
from ..strategies.session_factory import MakeSession, SessionFactory
from ..strategies.several.servers import can_prepare
from ..strategies.several.several_units import Part, SeveralUnits
from ..strategies.unit_of_work import UnitOfWork
from ..strategies.worker_pool import outside_worker
from . import apps, selection
from ._celery import known_task
from .async_side import AsyncSide
from .database_refusals import no_database, refuse_async, refuse_what_it_cannot
from .errors import ConfigurationError, as_configuration_error
from .exactly_once import choosing as once
from .isolation import IsolatingRunner
from .request import RequestRunner
from .running_tasks import RunningTasks
from .secrecy import MASK, PREFIX
from .sending import outbox
from .sending.received import Received
from .session_options import session_options
from .settings import DEFAULT, Settings, read_settings
from .soft_limits import DeferringRunner
from .watching import observers
from .wrapping import async_tasks, is_database_task


class DeferringPart(DeferringUnit, Part):
    """A part on another database, under prefork."""


class DeferringSeveralUnits(DeferringUnit, SeveralUnits):
    """A unit of work over several databases, under prefork."""

    part_class: type[Part] = DeferringPart


class DeferringUnitOfWork(DeferringUnit):
    """A unit of work on one database, under prefork."""


class Database:
    """What an Alchemy is at run time.

    Args:
        engine: The user's Engine.
        session_factory: As of SessionFactory.
        database: Its name.
    """

    def __init__(self, engine: Engine | None, session_factory: MakeSession | None, database: str) -> None:
        self.app: Celery | None = None
        self.database = database
        self.session_factory = session_factory
        self.units: UnitOfWorkRegistry = UnitOfWorkRegistry(lambda: self.strategy, self.unit_options)
        self.coroutines: AsyncSide = AsyncSide(self)
        self.runners: dict[type, RequestRunner] = {}
        """What runs the requests of each task, by its class; made when it first runs."""
        self.lock: threading.RLock = threading.RLock()
        self.pinned: SessionStrategy | None = None
        """In force whatever else was chosen: a test's."""
        self.worker: Callable[[], Any] | None = None
        """A weak reference to the worker of this process, of the app's default database; None where there is none."""
        self.received: Received | None = None
        """The requests of this process that have ended, whose messages the outbox still has; None: there was none."""
        self._running = RunningTasks()
        self._user_engine = engine
        self.succession: Succession = Succession()
        self._listeners: list[EngineListener] = []
        self._engines: EngineFactory | None = None
        self._settings: Settings | None = None
        self._strategy: SessionStrategy | None = None

    # -- settings ----------------------------------------------------------------------------------------------------

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

    def count_databases(self) -> int:
        """Return how many databases the app has."""
        raise NotImplementedError

    def unit_options(
        self,
        *,
        commits: bool,
        read_only: ReadOnly = False,
        extra: tuple[UnitHook, ...] = (),
        session_kind: type[Session] | None = None,
    ) -> UnitOptions:
        """Return how units of work on this database are treated."""
        return self.options_of(self, commits=commits, read_only=read_only, extra=extra, session_kind=session_kind)

    def options_of(
        self,
        side: Database | AsyncSide,
        *,
        commits: bool,
        read_only: ReadOnly,
        extra: tuple[UnitHook, ...],
        session_kind: type[Session] | None = None,
    ) -> UnitOptions:
        """Return how units of work of ordinary code, or of coroutines, are treated."""
        return unit_options(
            side.strategy.engines.options,
            lambda: side.strategy,
            commits=commits,
            read_only=read_only,
            always=(*observers.hooks(), *outbox.hooks(self.settings)),
            extra=extra,
            session_kind=session_kind,
        )

    def records(self, name: str | None = None) -> bool:
        """Tell whether the task of that name, or any task, has `exactly_once`, and records here that it completes."""
        assert self.app is not None
        if name is None:
            return once.has_any(self.app, self.settings)
        task = known_task(self.app, name)
        return task is not None and is_database_task(task) and once.mode_of(task, self.settings) is not None

    def runner_of(self, task: Any) -> RequestRunner:
        """Return what runs the requests of `task`."""
        runner = self.runners.get(type(task))
        if runner is None:
            runner = self.runners[type(task)] = self._new_runner(task)
        return runner

    def _new_runner(self, task: Any) -> RequestRunner:
        settings = self.settings
        commits = task.commit_on_success if task.commit_on_success is not None else settings.commit_on_success
        retries = task.isolation_retries if task.isolation_retries is not None else settings.isolation_retries
        mode = once.mode_of(task, settings)
        if task.is_async:
            return self.coroutines.new_runner(commits, task.read_only, retries, mode)
        if mode is None:
            options = self.unit_options(commits=commits, read_only=task.read_only)
        else:
            options = self.unit_options(commits=commits, extra=once.hooks(), session_kind=once.OnceSession)
        kind = DeferringRunner if self.strategy.worker_pool.forks else RequestRunner
        runner = kind(self.units, options, self.unit_options(commits=True))
        if mode is not None:
            return once.runner(self, runner, mode, retries)
        return IsolatingRunner(runner, retries) if retries > 0 else runner

    # -- the strategy ------------------------------------------------------------------------------------------------

    @property
    def strategy(self) -> SessionStrategy:
        """The SessionStrategy in force; outside a worker the one chosen for the worker pool `none`.

        Raises:
            ConfigurationError: the settings do not say enough, or something that cannot work.
        """
        strategy = self.pinned or self._strategy
        if strategy is None:
            with self.lock:
                strategy = self._strategy or self._start(self.worker_pool(), None, anew=False)
        return strategy

    def pin(self, strategy: SessionStrategy | None) -> None:
        """Let `strategy` be in force whatever else was chosen; None: no longer."""
        self.pinned = strategy
        self.coroutines.pin(pinned=strategy is not None)
        self._in_force(strategy or self._strategy)

    def _in_force(self, strategy: SessionStrategy | None) -> None:
        self.runners.clear()
        several = strategy is not None and self.count_databases() > 1
        unit_class = _UNIT_CLASSES[several, strategy is not None and strategy.worker_pool.forks]
        self.units.use(strategy, AsyncUnitOfWork if isinstance(strategy, PerLoopStrategy) else unit_class)

    def refresh(self) -> None:
        """Look again how many databases the app has: one was added, or taken away."""
        if self.units.strategy is not None:
            self._in_force(self.units.strategy)

    def worker_pool(self) -> WorkerPool:
        """Return the worker pool of the default database: this one was first used after the worker's start."""
        default = apps.find(self.app) if self.app is not None else None
        if default is None or default._strategy is None:
            return outside_worker()
        worker_pool: WorkerPool = default._strategy.worker_pool
        return worker_pool

    def start_worker(self, worker_pool: WorkerPool, strategy_name: str | None = None) -> SessionStrategy:
        """Choose and prepare the strategy for `worker_pool`, connecting to nothing; called by the bootstep.

        Raises:
            ConfigurationError: a setting is missing, unknown or of no use.
        """
        if self.pinned is not None:
            return self.pinned
        with self.lock:
            self._settings = None  # read again: the configuration may have changed since the module was imported
            if self.settings.metrics is not None and observers.current() is None:
                observers.start(self.settings.metrics)
            return self._start(worker_pool, strategy_name)

    def start_spawned(self, worker_pool: WorkerPool, strategy_name: str | None) -> None:
        """Take over, in a spawned pool process, what the main process decided."""
        if self._strategy is None or self._strategy.worker_pool.main_pid != worker_pool.main_pid:
            self.start_worker(worker_pool, strategy_name)

    def stop(self) -> None:
        """Close idle connections and forget the strategy: the worker, or this process's part of it, is over."""
        if self.pinned is not None:
            return  # a test's worker ends, and the test goes on
        if self.received is not None:
            self.received.drop()
        strategy, self._strategy = self._strategy, None
        self.coroutines.stop()
        self._in_force(None)
        if self.app is not None:
            outbox.close_idle(self.app)
        if strategy is not None:
            strategy.dispose()

    def close_before_fork(self) -> None:
        """Close idle connections: the main process is about to fork a pool process."""
        for strategy in (self._strategy, self.coroutines.started):
            if strategy is not None and strategy.worker_pool.in_main_process:
                strategy.dispose()

    def _start(self, worker_pool: WorkerPool, strategy_name: str | None, *, anew: bool = True) -> SessionStrategy:
        with as_configuration_error():
            settings = self.settings
            options, url, engine = self._database_options(settings, may_await=self._has_async_tasks)
            if url is not None and not has_sync_side(url):
                self._strategy = self.coroutines.start(worker_pool) if anew else self.coroutines.strategy
                self._in_force(self.pinned or self._strategy)
                return self._strategy
            url = sync_url(url) if url is not None else None
            sessions = SessionFactory(
                self.session_factory, *session_options(settings, options, deferring=worker_pool.forks)
            )
            engines = self._engine_factory(url, engine, options, worker_pool)
            strategy_class, reason = selection.choose(settings.session_strategy, strategy_name, worker_pool)
            engines.phrases = phrases(options, engines.url)
            for one in filter(None, (engines.url, options.replica_url)):
                green.prepare(worker_pool, one)
            strategy = strategy_class(engines, sessions, worker_pool, reason)
            strategy.start()
        previous, self._strategy = self._strategy, strategy
        self._in_force(self.pinned or strategy)
        if previous is not None and previous._engine is not strategy._engine:
            previous.dispose()
        return strategy

    def for_coroutines(self, worker_pool: WorkerPool) -> tuple[EngineFactory, SessionFactory]:
        """Return what makes the AsyncEngines, and the Sessions inside AsyncSessions."""
        from ..strategies.asynchronous.sessions import AwaitingSession, hold_limits_in_awaited_commits

        options, url, engine = self._database_options(self.settings, may_await=lambda: True)
        if engine is not None:
            raise ConfigurationError(
                "An `async def` task needs an AsyncEngine, one for each event loop, and Alchemy(engine=...) brings an "
                "Engine. Set app.conf.alchemy_database_url instead; listeners go into @db.on_engine."
            )
        sessions = SessionFactory(self.session_factory, self.settings.session_options, (AwaitingSession,))
        hooks = (*self._engine_hooks(), hold_limits_in_awaited_commits)
        engines = EngineFactory(url, None, options, self._running, observe_error, hooks, ReservedQueuePool)
        engines.phrases = phrases(options, engines.url, awaits=True)
        for listener in self._listeners:
            engines.on_engine(listener)
        return engines, sessions

    def _has_async_tasks(self) -> bool:
        return self.app is not None and bool(async_tasks(self.app))

    def _database_options(
        self, settings: Settings, *, may_await: Callable[[], bool]
    ) -> tuple[DatabaseOptions, URL | None, Engine | None]:
        """Return what the settings ask of the database, its URL, and the user's own Engine instead of that."""
        bind = SessionFactory(self.session_factory, {}).bind
        engine = self._user_engine or (bind if settings.database_url is None else None)
        url = None
        if engine is None:
            if settings.database_url is None or settings.database_url == "":
                raise ConfigurationError(no_database(self.database))
            spelled = self._spelled("url", "alchemy_database_url")
            url = parse_url(settings.database_url, spelled, may_await=may_await)
        else:
            refuse_async(engine)
            self._refuse_without_effect(settings, engine)
        replica = settings.replica_database_url
        replica_url = (
            parse_url(replica, self._spelled("replica_url", "alchemy_replica_database_url"), may_await=may_await)
            if replica
            else None
        )
        dialect = (url or engine.url).get_dialect()  # type: ignore[union-attr]
        count = self.count_databases()
        options = DatabaseOptions(
            database=self.database,
            databases=count,
            two_phase=settings.two_phase and count > 1 and can_prepare(dialect),
            statement_timeout_s=settings.statement_timeout_s,
            application_name=settings.application_name,
            external_pooler=settings.external_pooler is not None,
            reset_on_return=settings.reset_on_return,
            begin_with_first_statement=settings.begin_with_first_statement,
            engine_options=settings.engine_options,
            replica_url=replica_url,
        )
        refuse_what_it_cannot(settings, options, dialect)
        return options, url, engine

    def _engine_factory(
        self, url: URL | None, engine: Engine | None, options: DatabaseOptions, worker_pool: WorkerPool
    ) -> EngineFactory:
        kept = self._engines
        self._running.worker_pool = worker_pool
        hooks, pool_class = self._engine_hooks(), ReservedQueuePool
        if worker_pool.forks:
            hooks, pool_class = (*hooks, hold_limits_in_commits), DeferringQueuePool
        if observers.current() is not None:
            hooks, pool_class = (*hooks, observers.meter_pool), MeteredQueuePool
        if (
            kept is not None
            and (kept.user_engine, kept.options, kept.engine_options) == (engine, options, options.engine_options)
            and (engine or kept.url == url)
        ):
            kept.hooks, kept.pool_class = hooks, pool_class
            return kept
        engines = EngineFactory(url, engine, options, self._running, observe_error, hooks, pool_class)
        engines.succession = self.succession
        for listener in self._listeners:
            engines.on_engine(listener)
        self._engines = engines
        return engines

    def _engine_hooks(self) -> tuple[EngineHook, ...]:
        return (*ENGINE_HOOKS, *observers.engine_hooks(self.settings))

    def _refuse_without_effect(self, settings: Settings, engine: Engine) -> None:
        """Refuse settings that say how an Engine is made, where the user has brought one."""
        brought = "Alchemy(engine=...)" if self._user_engine is not None else "the bind of session_factory"
        for key, (value, instead) in {
            "database_url": (settings.database_url, "leave the Engine out"),
            "replica_database_url": (settings.replica_database_url, "leave the Engine out"),
            "engine_options": (settings.engine_options, "give them to create_engine() where your Engine is made"),
        }.items():
            if value:
                given = ", ".join(map(repr, value)) if isinstance(value, dict) else shown_text(value) or MASK
                raise ConfigurationError(
                    f"{self._spelled(key.replace('database_', ''), PREFIX + key)} ({given}) has no effect: {brought} "
                    f"brings an Engine, of {shown(engine.url)!r}. Leave it out, or {instead}."
                )

    def _spelled(self, key: str, setting: str) -> str:
        return setting if self.database == DEFAULT else f"alchemy_databases[{self.database!r}][{key!r}]"

    def after_fork(self) -> None:
        """Begin anew in the child: the thread that held the lock in the parent is not there to release it."""
        self.lock = threading.RLock()


#: By: the app has several databases, and the worker pool forks.
_UNIT_CLASSES: dict[tuple[bool, bool], type[UnitOfWork]] = {
    (False, False): UnitOfWork,
    (False, True): DeferringUnitOfWork,
    (True, False): SeveralUnits,
    (True, True): DeferringSeveralUnits,
}
