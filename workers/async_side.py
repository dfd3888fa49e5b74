"""One database of an app for its coroutines: the strategy in force, and their units of work."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from ..strategies import SessionStrategy
from ..strategies.asynchronous.strategy import PerLoopStrategy
from ..strategies.asynchronous.units import AsyncSeveralUnits, AsyncUnitOfWork, AsyncUnits
from ..strategies.entry import UnitOptions
from ..strategies.features.read_only import ReadOnly
from ..strategies.hooks import UnitHook
from ..strategies.worker_pool import WorkerPool
from .async_request import AsyncRunner, DeferringAsyncRunner, HostingRunner
from .errors import ConfigurationError, as_configuration_error
from .exactly_once import choosing as once
from .isolation import IsolatingRunner
from .request import RequestRunner


class AsyncSide:
    """What a Database is for coroutines.

    Args:
        db: The Database.
    """

    def __init__(self, db: Any) -> None:
        self._db = db
        self.units: AsyncUnits = AsyncUnits(lambda: self.strategy, self.unit_options, db.units)
        self._strategy: PerLoopStrategy | None = None

    @property
    def strategy(self) -> PerLoopStrategy:
        """The strategy in force, chosen at first use where no worker has.

        Raises:
            ConfigurationError: the settings do not say enough, or something that cannot work.
        """
        if self._db.pinned is not None:
            raise ConfigurationError(
                "db.one_transaction() and the fixture alchemy_session are for ordinary tasks: an `async def` task "
                "would commit on a connection of its own. Test it with a database of its own."
            )
        strategy = self._strategy
        if strategy is None:
            with self._db.lock:
                strategy = self._strategy or self.start(self._db.worker_pool())
        return strategy

    def start(self, worker_pool: WorkerPool) -> PerLoopStrategy:
        """Prepare the strategy for `worker_pool`, connecting to nothing.

        Raises:
            ConfigurationError: the driver cannot be awaited, or a setting is of no use.
        """
        with as_configuration_error():
            engines, sessions = self._db.for_coroutines(worker_pool)
            reason = "auto: an AsyncEngine belongs to one event loop"
            strategy = PerLoopStrategy(engines, sessions, worker_pool, reason)
            strategy.start()
        if engines.options.two_phase:
            raise ConfigurationError(
                "alchemy_two_phase is for ordinary tasks; `async def` tasks commit in several databases one after the "
                "other. Leave it out, or make the tasks that need it DatabaseTasks of an app of their own."
            )
        ordinary = self._db._strategy
        if ordinary is not None and not isinstance(ordinary, PerLoopStrategy):
            ordinary.beside, strategy.is_beside = strategy, True
        self._in_force(strategy)
        previous, self._strategy = self._strategy, strategy  # last: another thread takes it for ready
        if previous is not None:
            previous.dispose()
        return strategy

    def pin(self, *, pinned: bool) -> None:
        """Refuse units of work while all is in one transaction, a test's."""
        self._in_force(None if pinned else self._strategy)

    def _in_force(self, strategy: SessionStrategy | None) -> None:
        several = strategy is not None and self._db.count_databases() > 1
        self.units.use(strategy, AsyncSeveralUnits if several else AsyncUnitOfWork)

    @property
    def started(self) -> PerLoopStrategy | None:
        """The strategy in force; None where nothing has asked for it."""
        return self._strategy

    def stop(self) -> None:
        """Close idle connections and forget the strategy."""
        strategy, self._strategy = self._strategy, None
        self._in_force(None)
        if strategy is not None:
            strategy.dispose()

    def unit_options(
        self,
        *,
        commits: bool,
        read_only: ReadOnly = False,
        extra: tuple[UnitHook, ...] = (),
        session_kind: type[Session] | None = None,
    ) -> UnitOptions:
        """Return how units of work of coroutines are treated."""
        options: UnitOptions = self._db.options_of(
            self, commits=commits, read_only=read_only, extra=extra, session_kind=session_kind
        )
        return options

    def new_runner(self, commits: bool, read_only: ReadOnly, retries: int, mode: once.Mode | None) -> RequestRunner:
        """Return what runs the requests of one `async def` task.

        Args:
            retries: Its `isolation_retries`.
            mode: When its row is written (`exactly_once`); None: it has none.
        """
        if mode is None:
            options = self.unit_options(commits=commits, read_only=read_only)
        else:
            options = self.unit_options(commits=commits, extra=once.hooks(), session_kind=once.OnceSession)
        runner: RequestRunner = HostingRunner(self.units, options, self.unit_options(commits=True))
        if mode is not None:
            runner = once.runner(self._db, runner, mode, retries, self)
        elif retries > 0:
            runner = IsolatingRunner(runner, retries)
        kind = DeferringAsyncRunner if self.strategy.worker_pool.forks else AsyncRunner
        return kind(runner, self.units)
