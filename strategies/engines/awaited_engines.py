"""The Engines of a process on its event loops: one for each loop, made on first use and closed there.

Its connections belong to the loop: another one cannot wait for them. The child of a fork has none of the parent's
loops, and drops what it has inherited.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from ..drivers.awaited_urls import has_sync_side
from ..errors import CeleryAlchemyError
from . import forks
from .awaited_pool import AwaitedQueuePool
from .factory import EngineFactory
from .sizing import PoolSize


class AwaitedEngines:
    """Gives each event loop of the process its AsyncEngine.

    Args:
        factory: Makes Engines, for this and for what is not awaited: hooks and listeners are the same for both.
        size: Returns the size of the connection pool.
    """

    def __init__(self, factory: EngineFactory, size: Callable[[], PoolSize]) -> None:
        self._factory = factory
        self._size = size
        self._made: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncEngine] = weakref.WeakKeyDictionary()
        self._readers: weakref.WeakKeyDictionary[AsyncEngine, AsyncEngine] = weakref.WeakKeyDictionary()
        forks.on_fork(self.after_fork)

    @property
    def engine(self) -> AsyncEngine:
        """The AsyncEngine of the running event loop; connected by its first statement.

        Raises:
            CeleryAlchemyError: no event loop runs in this thread.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise CeleryAlchemyError(self._without_loop()) from None
        found = self._made.get(loop)
        if found is None:
            engine = self._factory.awaited(self._size())
            found = self._made[loop] = AsyncEngine(engine)
            try:
                self._factory.notify(engine)
            except BaseException:
                del self._made[loop]  # a listener that raises runs again, rather than be left out
                raise
        return found

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

    @property
    def reader(self) -> AsyncEngine:
        """The AsyncEngine of the running event loop for what only reads; each statement commits itself."""
        main = self.engine
        found = self._readers.get(main)
        if found is None:
            engine = self._factory.reading(main.sync_engine)
            found = self._readers[main] = AsyncEngine(engine)
            self._factory.notify(engine)
        return found

    def made(self) -> list[AsyncEngine]:
        """Return those that this process has made so far."""
        return [*self._made.values(), *self._readers.values()]

    async def dispose(self) -> None:
        """Close the idle connections of the running loop; what is in use is closed when it comes back."""
        main = self._made.pop(asyncio.get_running_loop(), None)
        if main is None:
            return
        for engine in filter(None, (main, self._readers.pop(main, None))):
            pool: Any = engine.sync_engine.pool
            self._factory.leave([engine.sync_engine])
            await engine.dispose()
            if isinstance(pool, AwaitedQueuePool):
                await pool.closed()

    def after_fork(self) -> None:
        """Drop what was inherited, and close nothing: to close a loop here would take the parent's loop its wake-up."""
        for loop, engine in list(self._made.items()):
            forks.keep_for_good(loop)
            forks.keep_for_good(engine)
        for engine in self._readers.values():
            forks.keep_for_good(engine)
        self._readers = weakref.WeakKeyDictionary()
        self._made = weakref.WeakKeyDictionary()
