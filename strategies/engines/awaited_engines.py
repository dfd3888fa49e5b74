"""The Engines of a process on its event loops: one for each loop, made on first use and closed when the loop ends.

Its connections belong to the loop: another one cannot wait for them. The child of a fork has none of the parent's
loops, and drops what it has inherited.

What is made for a loop is kept by the loop, so that it goes when the loop goes. The end of a loop is known by an
asynchronous generator: `asyncio.run()`, and all else that ends a loop well, closes those that are left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import AsyncGenerator, Callable
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from .._sqlalchemy_pools import idle_records
from ..drivers.awaited_urls import has_sync_side
from ..drivers.base import driver_of
from ..errors import CeleryAlchemyError
from . import forks
from .awaited_pool import AwaitedQueuePool
from .factory import EngineFactory
from .pool import queues_of
from .sizing import PoolSize

logger: logging.Logger = logging.getLogger(__name__)

ON_LOOP = "_celery_alchemy_engines"
"""Attribute of an event loop: what has been made for it, by who has made it. Of an Engine: with what it was made."""
END_S = 2.0
"""Seconds in which connections are closed when their loop ends."""
RETURN_S = 0.5
"""Seconds that are waited then for what is still in use."""


class _OfLoop:
    """The AsyncEngines of one event loop."""

    def __init__(self, factory: EngineFactory, main: AsyncEngine) -> None:
        self.factory = factory
        self.main = self._kept_by(main)
        self.reader: AsyncEngine | None = None
        self.end: AsyncGenerator[None, None] | None = None
        """Closed by the loop when it ends."""

    def _kept_by(self, engine: AsyncEngine) -> AsyncEngine:
        """Live as long as `engine`: code that goes on with it when the strategy is over may connect anew."""
        setattr(engine.sync_engine, ON_LOOP, self)
        return engine

    def read(self, engine: AsyncEngine) -> AsyncEngine:
        """Let `engine` be the one that only reads."""
        self.reader = self._kept_by(engine)
        return engine

    @property
    def made(self) -> list[AsyncEngine]:
        return [engine for engine in (self.main, self.reader) if engine is not None]

    async def dispose(self) -> None:
        """Close what is idle; called on the loop."""
        for engine in self.made:
            pool: Any = engine.sync_engine.pool
            await engine.dispose()
            if isinstance(pool, AwaitedQueuePool):
                await pool.closed()

    async def finish(self) -> None:
        """Close everything; called on the loop, which ends. Generators of the user's, which end at the same time, give
        back what they have."""
        pools: list[Any] = [engine.sync_engine.pool for engine in self.made]
        deadline = asyncio.get_running_loop().time() + RETURN_S
        while asyncio.get_running_loop().time() < deadline:
            if not any(pool.checkedout() for pool in pools if isinstance(pool, AwaitedQueuePool)):
                break
            await asyncio.sleep(0.01)
        await self.dispose()

    def abandon(self) -> None:
        """Close what is idle without the loop, which is closed."""
        for engine in self.made:
            driver = driver_of(engine.dialect)
            for pool in queues_of(engine.sync_engine.pool):
                for record in idle_records(pool):
                    if record.dbapi_connection is not None:
                        with contextlib.suppress(Exception):  # it is closed already
                            driver.abandon(record.dbapi_connection)
        self.leave()

    def leave(self) -> None:
        self.factory.leave([engine.sync_engine for engine in self.made])


class AwaitedEngines:
    """Gives each event loop of the process its AsyncEngine.

    Args:
        factory: Makes Engines, for this and for what is not awaited: hooks and listeners are the same for both.
        size: Returns the size of the connection pool.
    """

    def __init__(self, factory: EngineFactory, size: Callable[[], PoolSize]) -> None:
        self._factory = factory
        self._size = size
        self._loops: set[weakref.ref[asyncio.AbstractEventLoop]] = set()
        forks.on_fork(self.after_fork)

    @property
    def engine(self) -> AsyncEngine:
        """The AsyncEngine of the running event loop; connected by its first statement.

        Raises:
            CeleryAlchemyError: no event loop runs in this thread.
        """
        return self._here().main

    @property
    def reader(self) -> AsyncEngine:
        """The AsyncEngine of the running event loop for what only reads; each statement commits itself."""
        of_loop = self._here()
        if of_loop.reader is None:
            engine = self._factory.reading(of_loop.main.sync_engine)
            self._factory.notify(engine)
            return of_loop.read(AsyncEngine(engine))
        return of_loop.reader

    def _here(self) -> _OfLoop:
        try:
            loop: Any = asyncio.get_running_loop()
        except RuntimeError:
            raise CeleryAlchemyError(self._without_loop()) from None
        kept = getattr(loop, ON_LOOP, None)
        found: _OfLoop | None = None if kept is None else kept.get(self)
        return found if found is not None else self._make(loop)

    def _make(self, loop: Any) -> _OfLoop:
        self.drop_closed()
        engine = self._factory.awaited(self._size())
        if not hasattr(loop, ON_LOOP):
            setattr(loop, ON_LOOP, weakref.WeakKeyDictionary())
        kept = getattr(loop, ON_LOOP)
        made = kept[self] = _OfLoop(self._factory, AsyncEngine(engine))  # before the listeners: one may ask for it
        try:
            self._factory.notify(engine)
        except BaseException:
            del kept[self]  # a listener that raises runs again, rather than be left out
            raise
        self._loops.add(weakref.ref(loop, self._loops.discard))
        made.end = _at_the_end(made)
        with contextlib.suppress(StopIteration):
            made.end.asend(None).send(None)  # from now on the loop knows of it
        return made

    def _without_loop(self) -> str:
        url = self._factory.url
        if has_sync_side(url):
            return (
                "An AsyncEngine belongs to an event loop, and none runs here. Ask for db.async_engine in a coroutine; "
                "ordinary functions use db.engine."
            )
        return (
            f"The driver {url.get_driver_name()} can only be awaited: its Engine belongs to an event loop, and none "
            f"runs here. Use db.async_engine, or db.async_unit_of_work(), in a coroutine. A script that creates the "
            f"tables: `async with db.async_engine.begin() as connection: await "
            f"connection.run_sync(Base.metadata.create_all)`, in a coroutine that asyncio.run() runs; docs/async.md "
            f"has it in full."
        )

    def made(self) -> list[AsyncEngine]:
        """Return those that this process has made so far, on event loops that have not ended."""
        return [engine for loop in self.loops() for engine in self._of(loop).made]

    def loops(self) -> list[asyncio.AbstractEventLoop]:
        """Return the event loops that have one; those that are closed are dropped."""
        self.drop_closed()
        return self._known()

    def _known(self) -> list[asyncio.AbstractEventLoop]:
        found = [loop for reference in list(self._loops) if (loop := reference()) is not None]
        return [loop for loop in found if self in getattr(loop, ON_LOOP, ())]

    def _of(self, loop: asyncio.AbstractEventLoop) -> _OfLoop:
        found: _OfLoop = getattr(loop, ON_LOOP)[self]
        return found

    async def dispose(self) -> None:
        """Close the idle connections of the running loop; what is in use is closed when it comes back."""
        loop = asyncio.get_running_loop()
        found: _OfLoop | None = getattr(loop, ON_LOOP, {}).get(self)
        if found is not None:
            await found.dispose()

    def drop_closed(self) -> None:
        """Drop what belongs to loops that were closed and not ended well: nothing can be awaited there any more."""
        for loop in self._known():
            if loop.is_closed():
                found = getattr(loop, ON_LOOP).pop(self, None)
                if found is not None:
                    found.abandon()

    def after_fork(self) -> None:
        """Drop what was inherited, and close nothing: to close a loop here would take the parent's loop its wake-up."""
        for loop in self._known():
            forks.keep_for_good(loop)
            forks.keep_for_good(getattr(loop, ON_LOOP).pop(self))
        self._loops = set()


async def _at_the_end(of_loop: _OfLoop) -> AsyncGenerator[None, None]:
    """Close the connections of a loop when that closes its asynchronous generators."""
    try:
        yield
    finally:
        try:
            await asyncio.wait_for(of_loop.finish(), END_S)
        except Exception as error:
            logger.info("Connections were not closed at the end of their event loop: %r", error)
        of_loop.leave()
