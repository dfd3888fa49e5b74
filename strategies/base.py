"""The contract of a session strategy."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import ClassVar

from sqlalchemy import literal, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from .engines import forks, pool
from .engines.factory import EngineFactory
from .engines.leaks import take_back
from .engines.sizing import PoolSize, size_for, tasks_may_queue
from .errors import InvalidSetting, refused_as
from .hooks import OpenUnit
from .scope import here
from .session_factory import MakeSession, SessionFactory
from .worker_pool import NO_WORKER, WorkerPool


class SessionStrategy(ABC):
    """How Sessions and their Engine are managed in this process. Each strategy answers three questions, in words for
    people (`engine_lives`, `keyed_on`, `released`) and in code (`engine`, `open`, `release`).

    What a transaction's end is (commit, rollback) is not a strategy's business: `UnitOfWork` decides it, for all alike.

    To write one, subclass and name it in `alchemy_session_strategy = "package.module:Class"`, or register it under the
    entry point group `celery_alchemy.strategies`.

    Args:
        engines: Makes Engines from the settings, guarded against forks.
        sessions: Makes Sessions from the settings.
        worker_pool: What is known of the running worker pool.
        reason: Why this strategy was chosen, for the log line at worker start.
    """

    name: ClassVar[str]
    engine_lives: ClassVar[str]
    keyed_on: ClassVar[str]
    released: ClassVar[str]

    def __init__(
        self, engines: EngineFactory, sessions: SessionFactory, worker_pool: WorkerPool, reason: str = ""
    ) -> None:
        self.engines = engines
        self.sessions = sessions
        self.worker_pool = worker_pool
        self.reason = reason
        options = engines.options
        self.size: PoolSize = engines.given_size() or size_for(
            worker_pool, engines.url, options.engine_options, options.databases
        )
        engines.tasks_may_queue = options.databases > 1 and tasks_may_queue(worker_pool, self.size)
        engines.serves_tasks = worker_pool.name != NO_WORKER
        self.follows_units: bool = self._follows_units()
        """`enter` and `leave` are to be called: a subclass has its own, or prefork's main process is to be kept
        without connections."""
        kept = all(getattr(type(self), name) is getattr(SessionStrategy, name) for name in ("open", "release"))
        self.new_session: MakeSession | None = sessions.new if kept else None
        """Makes a Session; None where a subclass has an `open` or a `release` of its own, which are to be called."""
        self._engine_lock = threading.RLock()
        forks.on_fork(self.after_fork)

    @classmethod
    def refuses(cls, worker_pool: WorkerPool) -> str | None:
        """Return why this strategy cannot serve `worker_pool`, which stops the worker; None when it can."""
        return None

    # -- the Engine --------------------------------------------------------------------------------------------------

    keeps_engine: ClassVar[bool] = True
    """Its Engine is the same in the child of a fork."""
    _engine: Engine | None = None
    """This process's Engine, where it has been made."""
    _making: Engine | None = None
    """The Engine while listeners of `db.on_engine` prepare it."""

    @property
    def engine(self) -> Engine:
        """This process's Engine; made on first use, connected by its first statement."""
        return self._engine or self._first_engine()

    def _first_engine(self) -> Engine:
        with self._engine_lock:  # threads meet here: a second one's Engine would be lost with its connections
            found = self._engine or self._making  # a listener may ask for it
            if found is not None:
                return found
            try:
                engine = self._making = self.make_engine()
                self.engines.put_in_place(engine)
                self._engine = engine
            finally:
                self._making = None
            return engine

    _read_engine: Engine | None = None
    shares_connection = False
    """All its Sessions are on one connection, in one transaction: nothing may be set for it."""
    awaits: ClassVar[bool] = False
    """Its statements are awaited: they stop no event loop."""
    reads_apart = False
    """Some tasks are `read_only=True`: `read_engine` counts among the most connections."""

    beside: SessionStrategy | None = None
    """That of the coroutines of the app: its connections count among the most connections."""

    @property
    def read_engine(self) -> Engine:
        """This process's Engine for what only reads; made on first use, connected by its first statement."""
        if self._read_engine is None:
            main = self.engine
            with self.engines.lock:  # threads meet here: a second one's Engine would be lost with its connections
                if self._read_engine is None:
                    self._read_engine = self.engines.reading(main)
            if self._read_engine is not main and self.engines.user_engine is None:
                self.engines.notify(self._read_engine)
        return self._read_engine

    @abstractmethod
    def make_engine(self) -> Engine:
        """Return an Engine for this process, from `self.engines`: `shared`, `pooled` or `unpooled`."""

    def start(self) -> None:
        """Make what will be needed, before the first task and connecting to nothing.

        Raises:
            InvalidSetting: the Engine or a Session cannot be made from the settings.
        """
        options = self.engines.options
        with refused_as(InvalidSetting, f"{options.options_setting} cannot be used", options.engine_options):
            # Made once to be looked at: under prefork the pool processes come too late to refuse an option.
            engine = self.engines.pooled(self.size)
            self._probe = engine.pool
            pool.max_connections(self._probe)
            str(select(literal(1)).compile(dialect=engine.dialect))
        refusal = pool.refuses(self._probe, self.worker_pool)
        if refusal:
            raise InvalidSetting(refusal)
        if self.worker_pool.name == NO_WORKER:
            self._probe = self.engine.pool
        self.engines.guard_others(self.sessions.binds)
        self.sessions.check(engine)
        if not (self.worker_pool.in_main_process and self.keeps_engine):
            # Else the pool processes make it: what traces each Engine that is made may be switched on there.
            _ = self.engine

    def after_fork(self) -> None:
        """The child of a fork begins: the inherited connections are already cut off, connection pools are empty."""
        self._engine_lock, self._making = threading.RLock(), None
        self.engines.after_fork()
        self.follows_units = self._follows_units()

    def _follows_units(self) -> bool:
        own = any(getattr(type(self), name) is not getattr(SessionStrategy, name) for name in ("enter", "leave"))
        return own or self.worker_pool.in_main_process

    def engines_made(self) -> list[Engine]:
        """Return the Engines that this process has made so far, or was given."""
        made = (self._engine, self._read_engine, *self.engines.others)
        # The Engine that reads may be a view of the user's, with the same connection pool.
        return list({id(engine.pool): engine for engine in made if engine is not None}.values())

    def dispose(self) -> None:
        """Close the idle connections of this process; makes no Engine for it.

        A connection pool that has made none is left alone: SQLAlchemy logs a line for each, and prefork's main process
        comes here before each fork.
        """
        for engine in self.engines_made():
            if pool.may_hold_any(engine.pool):
                engine.dispose()

    @property
    def max_connections(self) -> int | None:
        """The most connections this whole worker can have open; None when its connection pool sets no limit.

        Under prefork: every pool process, and as much again for the main process, where hooks may run.
        """
        each = self._each()
        if each is None:
            return None
        return each * (self.worker_pool.process_count + (1 if self.worker_pool.forks else 0))

    def _each(self) -> int | None:
        """Return the most connections of one process, `binds` included."""
        pools = [self._probe, *(engine.pool for engine in self.engines.others)]
        if self.reads_apart and self.engines.user_engine is None:
            pools.append(self._probe)  # as big as the other
        limits = [pool.max_connections(one) for one in pools]
        if self.beside is not None:
            limits.append(self.beside._each())
        return None if None in limits else sum(limit for limit in limits if limit is not None)

    def describe(self) -> str:
        """Return one line for people: strategy, reason, connection pool, most connections."""
        kind = "QueuePool" if isinstance(self._probe, pool.ReservedQueuePool) else type(self._probe).__name__
        size = f" {pool.size_of(self._probe)}" if isinstance(self._probe, QueuePool) else ""
        twice = " and as much for read-only tasks" if self.reads_apart and self.engines.user_engine is None else ""
        sizes = f"connection pool of each process: {kind}{size}{twice}"
        parts = (f"session strategy {self.name} ({self.reason})", sizes, self.describe_limit(), *self.engines.phrases)
        return ", ".join(parts)

    def describe_limit(self) -> str:
        """Return the most connections of this worker, for people."""
        each, most = self._each(), self.max_connections
        if most is None:
            return "no limit on connections"
        if self.worker_pool.forks:
            processes = f"{self.worker_pool.process_count} pool processes and the main process, {each} each"
            return f"at most {most} connections ({processes})"
        return f"at most {most} connections"

    # -- the Session -------------------------------------------------------------------------------------------------

    def enter(self, unit: OpenUnit) -> None:  # noqa: B027 - a hook, not a duty
        """`unit` begins in this thread or greenlet; no Session yet."""

    def open(self, unit: OpenUnit) -> Session:
        """Return the Session of `unit`, new. Called once per unit, on first use."""
        return self.sessions.new(bind=self._engine or self.engine)

    def release(self, unit: OpenUnit, session: Session) -> None:
        """Close `session`, the one `open` returned for `unit`; its connection goes back."""
        session.close()

    def leave(self, unit: OpenUnit) -> None:
        """`unit` is over; called once for every `enter`, after `release`."""
        if self.worker_pool.in_main_process:
            # Prefork's main process forks again later: it keeps no connection open that a child would inherit.
            self.dispose()

    def recycle(self) -> None:
        """Let no connection that is open now serve another unit of work."""
        for engine in self.engines_made():
            pool.recycle_all(engine.pool)

    def take_back(self) -> int:
        """Return to the connection pool what this thread or greenlet still holds of it; for after an interruption.

        Returns:
            How many connections there were; they are closed, for their state is not known.
        """
        own = self.engine.pool
        if not isinstance(own, pool.ReservedQueuePool):
            return 0
        taken = take_back([record for record in here().held if own.is_of(record)])
        if own.checkedout() > 0 and _only_thread():
            # One thread, its one task is over: what is still counted as out was lost in the interruption.
            self.engine.dispose()
            taken = max(taken, 1)
        return taken


def _only_thread() -> bool:
    """Tell whether the process has one thread that runs code of the user's."""
    return sum(1 for thread in threading.enumerate() if not thread.name.startswith("celery-alchemy")) == 1
