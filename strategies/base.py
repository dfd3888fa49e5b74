"""The contract of a session strategy."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from sqlalchemy import literal, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from . import checkouts, connection_pool, forks
from .engines import EngineSource
from .errors import InvalidSetting, refused_as
from .features import first_statement
from .interrupts import shield
from .sessions import SessionSource
from .sizing import PoolSize, is_scarce, size_for
from .worker_pool import NO_WORKER, WorkerPool

if TYPE_CHECKING:
    from .unit_of_work import UnitOfWork


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
        self, engines: EngineSource, sessions: SessionSource, worker_pool: WorkerPool, reason: str = ""
    ) -> None:
        self.engines = engines
        self.sessions = sessions
        self.worker_pool = worker_pool
        self.reason = reason
        self.size: PoolSize = engines.given_size() or size_for(
            worker_pool, engines.url, engines.options, engines.terms.databases
        )
        engines.scarce = engines.terms.databases > 1 and is_scarce(worker_pool, self.size)
        self.forks = worker_pool.forks
        """`worker_pool.forks`, looked at by every task."""
        engines.write_lock_at_begin = worker_pool.name != NO_WORKER
        forks.on_fork(self.after_fork)

    @classmethod
    def refuses(cls, worker_pool: WorkerPool) -> str | None:
        """Return why this strategy cannot serve `worker_pool`, which stops the worker; None when it can."""
        return None

    # -- the Engine --------------------------------------------------------------------------------------------------

    _engine: Engine | None = None
    """This process's Engine, where it has been made."""

    @property
    def engine(self) -> Engine:
        """This process's Engine; made on first use, connected by its first statement."""
        engine = self._engine
        if engine is None:
            engine = self._engine = self.make_engine()
            self.engines.announce(engine)
        return engine

    _read_engine: Engine | None = None
    shares_connection = False
    """All its Sessions are on one connection, in one transaction: nothing may be set for it."""
    reads_apart = False
    """Some tasks are `read_only=True`: `read_engine` counts among the most connections."""

    @property
    def read_engine(self) -> Engine:
        """This process's Engine for what only reads; made on first use, connected by its first statement."""
        if self._read_engine is None:
            main = self.engine
            with self.engines.lock:  # threads meet here: a second one's Engine would be lost with its connections
                if self._read_engine is None:
                    self._read_engine = self.engines.reading(main)
            if self._read_engine is not main and self.engines.given is None:
                self.engines.announce(self._read_engine)
        return self._read_engine

    @abstractmethod
    def make_engine(self) -> Engine:
        """Return an Engine for this process, from `self.engines`: `shared`, `pooled` or `unpooled`."""

    def start(self) -> None:
        """Make what will be needed, before the first task and connecting to nothing.

        Raises:
            InvalidSetting: the Engine or a Session cannot be made from the settings.
        """
        with refused_as(InvalidSetting, f"{self.engines.terms.options_setting} cannot be used", self.engines.options):
            # Made once to be looked at: under prefork the pool processes come too late to refuse an option.
            engine = self.engines.pooled(self.size)
            self._probe = engine.pool
            connection_pool.max_connections(self._probe)
            str(select(literal(1)).compile(dialect=engine.dialect))
        refusal = connection_pool.refuses(self._probe, self.worker_pool)
        if refusal:
            raise InvalidSetting(refusal)
        if self.worker_pool.name == NO_WORKER:
            self._probe = self.engine.pool
        self.engines.adopt_others(self.sessions.binds)
        self.sessions.check(self.engine)

    def after_fork(self) -> None:
        """The child of a fork begins: the inherited connections are already cut off, connection pools are empty."""
        self.engines.after_fork()

    def engines_made(self) -> list[Engine]:
        """Return the Engines that this process has made so far, or was given."""
        made = (self._engine, self._read_engine, *self.engines.others)
        # The Engine that reads may be a view of the user's, with the same connection pool.
        return list({id(engine.pool): engine for engine in made if engine is not None}.values())

    def dispose(self) -> None:
        """Close the connections that this process keeps open and nobody uses; makes no Engine for it."""
        for engine in self.engines_made():
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
        if self.reads_apart and self.engines.given is None:
            pools.append(self._probe)  # as big as the other
        limits = [connection_pool.max_connections(pool) for pool in pools]
        return None if None in limits else sum(limit for limit in limits if limit is not None)

    def describe(self) -> str:
        """Return one line for people: strategy, reason, connection pool, most connections."""
        each, most = self._each(), self.max_connections
        if most is None:
            limit = "no limit on connections"
        elif self.worker_pool.forks:
            processes = f"{self.worker_pool.process_count} pool processes and the main process, {each} each"
            limit = f"at most {most} connections ({processes})"
        else:
            limit = f"at most {most} connections"
        pool = type(self._probe).__name__.removeprefix("Reserved")
        size = f" {connection_pool.size_of(self._probe)}" if isinstance(self._probe, QueuePool) else ""
        twice = " and as much for read-only tasks" if self.reads_apart and self.engines.given is None else ""
        sizes = f"connection pool of each process: {pool}{size}{twice}"
        engines = self.engines
        begin = first_statement.describe(engines.terms.begin_with_first_statement, engines.url, engines.options)
        return f"session strategy {self.name} ({self.reason}), {sizes}, {limit}{', ' if begin else ''}{begin}"

    # -- the Session -------------------------------------------------------------------------------------------------

    def enter(self, unit: UnitOfWork) -> None:  # noqa: B027 - a hook, not a duty
        """`unit` begins in this thread or greenlet; no Session yet."""

    @abstractmethod
    def open(self, unit: UnitOfWork) -> Session:
        """Return the Session of `unit`, new. Called once per unit, on first use."""

    def release(self, unit: UnitOfWork, session: Session) -> None:
        """Close `session`, the one `open` returned for `unit`; its connection goes back."""
        session.close()

    def leave(self, unit: UnitOfWork) -> None:
        """`unit` is over; called once for every `enter`, after `release`."""
        if self.forks and self.worker_pool.in_main_process:
            # Prefork's main process forks again later: it keeps no connection open that a child would inherit.
            self.dispose()

    def recycle(self) -> None:
        """Let no connection that is open now serve another unit of work."""
        for engine in self.engines_made():
            connection_pool.recycle(engine.pool, time.time())

    def new_session(self) -> Session:
        return self.sessions.new(self.engine)

    def take_back(self) -> int:
        """Return to the connection pool what this thread or greenlet still holds of it; for after an interruption.

        Returns:
            How many connections there were; they are closed, for nobody knows their state.
        """
        pool = self.engine.pool
        if not (shield.applies and isinstance(pool, connection_pool.ReservedQueuePool)):
            return 0  # only a signal strikes between two bytecodes; SQLAlchemy itself minds every other interruption
        taken = len(checkouts.take_back(pool.held()))
        if pool.checkedout() > 0 and threading.active_count() == 1:
            # One thread, its one task is over: what is still counted as out was lost in the interruption.
            self.engine.dispose()
            taken = max(taken, 1)
        return taken
