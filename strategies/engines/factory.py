"""Making Engines: the defaults that tasks need, the guards that keep them safe, the user's options on top.

Features reach an Engine through `EngineHook`s: the factory calls each, in their order, for every Engine that it makes,
and for the one that the user brought. It knows none of them by name.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeGuard

import sqlalchemy
from sqlalchemy.engine import URL, Engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, NullPool, Pool, QueuePool

from .. import _sqlalchemy_pools
from .. import scope as scope_module
from ..drivers import sqlite
from ..drivers.awaited_urls import awaited_dialect, refuse_what_blocks
from ..drivers.base import driver_of
from ..drivers.url import shown
from ..errors import InvalidSetting
from ..interrupts import is_interrupt
from ..options import DatabaseOptions
from . import commits, forks, on_error, pool
from .held import HoldingWatch
from .on_error import ErrorObserver
from .sizing import PoolSize
from .succession import Succession

logger: logging.Logger = logging.getLogger(__name__)

EngineListener = Callable[[Engine], object]
_POOL_OPTIONS = frozenset({"pool_size", "max_overflow", "pool_timeout", "pool_use_lifo", "poolclass", "pool"})
WATCH = "_celery_alchemy_watch"
"""Attribute of an Engine that is served already, by whichever Alchemy of the process: the user's own may have several.
No table: what it would keep of an Engine knows that Engine, which would never be freed."""


class EngineHook(Protocol):
    """A feature that has something to do with each Engine: listeners, mostly. Called once for each, before it connects.

    A plain function is one; the shape is that of the public `db.on_engine`, with the options of the database.
    """

    def __call__(self, engine: Engine, options: DatabaseOptions, /) -> None:
        """Prepare `engine`."""


class Scope(Protocol):
    """What Engines ask about the thread or greenlet that is running."""

    def describe_holder(self) -> str:
        """Name its open units of work, the innermost first."""

    def waits_in_line(self, scope: scope_module.Scope, connections: int, /) -> bool:
        """Tell whether it is to wait with the tasks that compete for so many `connections`."""


class EngineFactory:
    """Where Engines come from: the user's own, or a URL with options.

    Args:
        url: Checked by `drivers.url.parse_url`; ignored when `engine` is given.
        engine: The user's Engine. It is never replaced, resized or closed behind the user's back: only its connection
            pool is made anew, with its own sizes, where a fork or a monkey patch makes that necessary.
        options: What the app asks of this database, the keyword arguments of `create_engine` among it, which win over
            every default here.
        scope: What an Engine asks about the thread or greenlet that wants a connection.
        observe: Called with every database error, for the message of a failed transaction.
        hooks: The features that have something to do with each Engine, in their order.
        pool_class: The connection pool's class, for this worker pool.
    """

    def __init__(
        self,
        url: URL | None,
        engine: Engine | None,
        options: DatabaseOptions,
        scope: Scope,
        observe: ErrorObserver,
        hooks: Sequence[EngineHook] = (),
        pool_class: type[pool.ReservedQueuePool] = pool.ReservedQueuePool,
    ) -> None:
        if engine is None and url is None:
            raise TypeError("an Engine or a URL is needed")
        self.user_engine = engine
        self.url: URL = engine.url if engine is not None else url  # type: ignore[assignment]
        self.options = options
        self.hooks: tuple[EngineHook, ...] = tuple(hooks)
        self.pool_class = pool_class
        self.phrases: tuple[str, ...] = ()
        """What features have to say in the log line at worker start."""
        self.tasks_may_queue = False
        """Tasks queue for the connections of this database, and use others beside it."""
        self.serves_tasks = False
        """Its Engines are those of a worker."""
        self.others: list[Engine] = []
        """Engines that the user's Sessions are bound to beside this one."""
        self.succession: Succession = Succession()
        """The Engines that were `db.engine` before."""
        self._scope = scope
        self._observe = observe
        self._listeners: list[EngineListener] = []
        self._notified: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._first: Engine | None = None
        self.lock: threading.Lock = threading.Lock()

    @property
    def engine_options(self) -> dict[str, Any]:
        """The keyword arguments of `create_engine` that the user gave."""
        return self.options.engine_options

    @property
    def waits_in_c(self) -> bool:
        """Whether a driver of its Engines waits inside C, where Python runs no signal handler."""
        urls = (self.url, self.options.replica_url, *(engine.url for engine in self.others))
        return any(driver_of(url.get_dialect()).waits_in_c for url in urls if url is not None)

    def after_fork(self) -> None:
        """Begin anew in the child: the thread that held the lock in the parent is not there to release it."""
        self.lock = threading.Lock()

    def on_engine(self, listener: EngineListener) -> None:
        """Run `listener(engine)` for every Engine made from now on, and for those that this process uses already."""
        self._listeners.append(listener)
        for engine in list(self._notified):
            with self.succession.ours(engine):
                listener(engine)

    def notify(self, engine: Engine) -> None:
        """Run the listeners for `engine`, once."""
        if engine not in self._notified:
            for listener in self._listeners:
                listener(engine)
            self._notified.add(engine)  # now: one that raises runs again, rather than be left out

    def put_in_place(self, engine: Engine) -> None:
        """Let `engine` be `db.engine` from now on, its listeners run and with what was put on the one before."""
        self.notify(engine)
        if engine is not self.user_engine:
            previous = self.succession.succeed(engine)
            if previous is not None:
                self._notified.discard(previous)

    def leave(self, engines: Iterable[Engine | None]) -> None:
        """`engines` are used no more in this process. The user's own is."""
        for engine in engines:
            if engine is not None and engine is not self.user_engine:
                self._notified.discard(engine)
                self.succession.leave(engine)

    def given_size(self) -> PoolSize | None:
        """Return the size of the user's own connection pool; None when there is none, or it is no queue."""
        if self.user_engine is None or not isinstance(self.user_engine.pool, QueuePool):
            return None
        return pool.size_of(self.user_engine.pool)

    def shared(self, size: PoolSize) -> Engine:
        """Return the one Engine that lives as long as this process, its connection pool of this `size`.

        An Engine made before the worker pool was known (a listener attached at import) is kept and resized.
        """
        if self.user_engine is not None:
            return self._take_over(self.user_engine)
        with self.lock:
            if self._first is None:
                self._first = self.pooled(size)
            else:
                self._resize(self._first, size)
                self._serve(self._first)
            return self._first

    def pooled(self, size: PoolSize) -> Engine:
        """Return a new Engine with a connection pool of this `size`; the user's own when there is one.

        Connects to nothing. Raises:
            InvalidSetting: the options are none that `create_engine` takes.
        """
        if self.user_engine is not None:
            return self._take_over(self.user_engine)
        if self.keeps_own_pool or self.engine_options.get("poolclass", QueuePool) is not QueuePool:
            return self._make(self.options, {})
        return self._make(self.options, self._queue(size), reserve=size.reserve)

    def unpooled(self) -> Engine:
        """Return a new Engine that closes each connection after use; the user's own when there is one."""
        if self.user_engine is not None:
            return self._take_over(self.user_engine)
        if sqlite.in_memory(self.url):
            return self._make(self.options, {})
        return self._make(self.options, {"poolclass": NullPool}, leave_out=_POOL_OPTIONS)

    def awaited(self, size: PoolSize) -> Engine:
        """Return a new Engine whose connections are awaited, the `sync_engine` of an AsyncEngine; its connection pool
        is of this `size`, and belongs to the event loop that runs.

        Connects to nothing. Raises:
            InvalidSetting: its driver cannot be awaited; or the options are none that `create_async_engine` takes.
        """
        refuse_what_blocks(self.url, "alchemy_database_url")
        from .awaited_pool import AwaitedQueuePool, MeteredAwaitedPool  # not imported by those who have no use for it

        kind = self.engine_options.get("poolclass", QueuePool)
        if self.keeps_own_pool or kind not in {QueuePool, AsyncAdaptedQueuePool}:
            return self._make(self.options, {}, create=_create_awaited)
        kind = MeteredAwaitedPool if issubclass(self.pool_class, pool.MeteredQueuePool) else AwaitedQueuePool
        decided = {**self._queue(size), "poolclass": kind}
        return self._make(self.options, decided, reserve=size.reserve, create=_create_awaited)

    @property
    def keeps_own_pool(self) -> bool:
        """The user brings a connection pool, or the database lives in one connection."""
        return "pool" in self.engine_options or sqlite.in_memory(self.url)

    def reading(self, main: Engine) -> Engine:
        """Return an Engine on which each statement commits itself, as big as `main`.

        The user's own Engine cannot be copied: its connections are used, switched to AUTOCOMMIT while they read.
        """
        if self.user_engine is not None:
            return main.execution_options(isolation_level="AUTOCOMMIT")
        if sqlite.in_memory(self.url):
            return main  # the database lives in its connection
        options = replace(self.options, reads=True)
        decided: dict[str, Any] = {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
        watch, create = getattr(main, WATCH, None), _create_awaited if main.dialect.is_async else None
        if isinstance(main.pool, pool.ReservedQueuePool):
            size = pool.size_of(main.pool)
            decided |= {**self._queue(size), "poolclass": type(main.pool)}
            return self._make(options, decided, reserve=size.reserve, like=watch, create=create)
        if isinstance(main.pool, NullPool):
            decided["poolclass"] = NullPool
            return self._make(options, decided, leave_out=_POOL_OPTIONS, like=watch, create=create)
        return self._make(options, decided, like=watch, create=create)

    def guard_others(self, engines: Iterable[Engine]) -> None:
        """Guard the Engines that the user's Sessions are bound to beside the main one (`binds`)."""
        self.others = list({id(engine): engine for engine in engines if engine is not self.user_engine}.values())
        for engine in self.others:
            self._watch(engine, self.options)
            if isinstance(engine.pool, QueuePool):
                self._resize(engine, pool.size_of(engine.pool))

    def _queue(self, size: PoolSize) -> dict[str, Any]:
        return {"poolclass": self.pool_class, "pool_size": size.pool_size, "max_overflow": size.max_overflow}

    def _make(
        self,
        options: DatabaseOptions,
        decided: dict[str, Any],
        *,
        leave_out: Iterable[str] = (),
        reserve: int = 0,
        like: HoldingWatch | None = None,
        create: Callable[..., Engine] | None = None,
    ) -> Engine:
        """Return a new Engine.

        Args:
            decided: Keyword arguments of `create_engine` that win over the user's.
            leave_out: Those of the user's that have no meaning here.
            like: Of the Engine beside which this one reads: who holds a connection of one must not queue for one of
                the other, for they could wait for each other.
            create: Makes an Engine whose connections are awaited.
        """
        url = (options.replica_url or self.url) if options.reads else self.url
        driver = driver_of(url.get_dialect() if create is None else awaited_dialect(url))
        given = self.engine_options
        arguments = driver.engine_arguments(options)
        arguments |= {name: value for name, value in given.items() if name not in leave_out} | decided
        arguments["connect_args"] = {**driver.connect_args(url, options), **given.get("connect_args", {})}
        try:
            # Looked up now: tracing tools put their own in its place, in a worker's signal at the earliest.
            engine = (create or sqlalchemy.create_engine)(url, **arguments)
        except Exception as error:
            if is_interrupt(error):
                raise
            names = ", ".join(sorted(given)) or "none"
            raise InvalidSetting(
                f"{options.options_setting} cannot be used with {shown(self.url)!r}: "
                f"{type(error).__name__}: {error}. Options given: {names} (values not shown)."
            ) from None
        _explain_failing_creator(engine, options.options_setting)
        self._watch(engine, options, like=like)
        if isinstance(engine.pool, pool.ReservedQueuePool):
            engine.pool.reserve = reserve
            self._configure_pool(engine, engine.pool)
        driver.listen(engine, options)
        self._serve(engine)
        for hook in self.hooks:
            hook(engine, options)
        return engine

    def _take_over(self, engine: Engine) -> Engine:
        """Guard the user's Engine, once, and give it a connection pool of this side of a fork or a monkey patch."""
        if not hasattr(engine, WATCH):
            self._watch(engine, self.options)
            for hook in self.hooks:
                hook(engine, self.options)
        self._resize(engine, self.given_size())
        return engine

    def _watch(self, engine: Engine, options: DatabaseOptions, *, like: HoldingWatch | None = None) -> None:
        forks.guard(engine.pool)
        if hasattr(engine, WATCH):
            return  # the user's Engine, served by another Alchemy before
        engine_id = like.engine_id if like is not None else object()
        watch = HoldingWatch(engine.dialect, engine_id)
        setattr(engine, WATCH, watch)
        watch.scarce = self.tasks_may_queue
        watch.listen(engine, by_pool=_becomes_ours(engine.pool))
        on_error.listen(engine, self._observe, options)
        commits.guard(engine)

    def _serve(self, engine: Engine) -> None:
        if self.serves_tasks:
            driver_of(engine.dialect).serve_tasks(engine)

    def _resize(self, engine: Engine, size: PoolSize | None) -> None:
        """Give `engine` a new connection pool: its locks are of this side of the fork and the monkey patch."""
        old = engine.pool
        if size is None or not _becomes_ours(old):
            return
        if type(old) is self.pool_class and pool.size_of(old) == size:
            return
        new = pool.resized(old, self.pool_class, size)
        self._configure_pool(engine, new)
        forks.guard(new)
        engine.pool = new
        _sqlalchemy_pools.retire(old)

    def _configure_pool(self, engine: Engine, new: pool.ReservedQueuePool) -> None:
        watch: HoldingWatch = getattr(engine, WATCH)
        watch.scarce = self.tasks_may_queue
        new.describe_holder, new.watch = self._scope.describe_holder, watch
        new.waits_in_line = self._scope.waits_in_line


def _create_awaited(url: URL, **arguments: Any) -> Engine:
    from sqlalchemy.ext import asyncio  # not imported by those who have no use for it

    return asyncio.create_async_engine(url, **arguments).sync_engine


def _becomes_ours(found: Pool) -> TypeGuard[QueuePool]:
    """Tell whether a connection pool is replaced by one of ours, or is one."""
    return type(found) is QueuePool or isinstance(found, pool.ReservedQueuePool)


def _explain_failing_creator(engine: Engine, setting: str) -> None:
    """Say where to look when connecting fails before the driver has asked the server: no check at start can find it."""

    def wrap(create: Callable[..., Any]) -> Callable[..., Any]:
        def creator(connection_record: ConnectionPoolEntry | None = None) -> Any:
            try:
                return create(connection_record)
            except (TypeError, ValueError, AttributeError, LookupError) as error:
                logger.error(
                    "Making a connection failed with %s before the server was asked. Look at connect_args and creator "
                    "in %s, and at what listens to the Engine.", type(error).__name__, setting,
                )  # fmt: skip
                raise

        return creator

    _sqlalchemy_pools.wrap_creator(engine.pool, wrap)
