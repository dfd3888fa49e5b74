"""The strategy of coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from sqlalchemy import literal, select
from sqlalchemy.engine import Engine

from ..base import SessionStrategy
from ..engines import pool
from ..engines.closing_tasks import ClosingTask
from ..errors import InvalidSetting, refused_as
from ..scope import runs_in_greenlet
from ..worker_pool import WorkerPool

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

logger: logging.Logger = logging.getLogger(__name__)

DISPOSE_S = 5.0
"""Seconds that are waited for other threads' event loops to close their idle connections."""


class PerLoopStrategy(SessionStrategy):
    """One AsyncSession per task request, on an AsyncEngine of the event loop.

    **Made for** `async def` tasks under asyncio, prefork, threads and solo.
    **Not made for** ordinary tasks, nor for gevent and eventlet, where no event loop runs.
    """

    name = "per_loop"
    awaits = True
    engine_lives = "the event loop of the process: made on it, disposed on it at the end; after a fork made anew"
    keyed_on = "the task request; in a coroutine that a task starts, the asyncio task"
    released = "at the request's end"

    is_beside = False
    """There is a strategy for ordinary tasks, which announces its connections too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from ..engines.awaited_engines import AwaitedEngines

        self._awaited = AwaitedEngines(self.engines, lambda: self.size)

    @classmethod
    def refuses(cls, worker_pool: WorkerPool) -> str | None:
        if worker_pool.is_green:
            return "no event loop runs beside its greenlets; run a worker with --pool=asyncio for the async tasks"
        return None

    @property
    def async_engine(self) -> AsyncEngine:
        """The AsyncEngine of the running event loop; made on first use, connected by its first statement."""
        return self._awaited.engine

    @property
    def engine(self) -> Engine:
        """The Engine inside it."""
        return self._awaited.engine.sync_engine

    @property
    def read_engine(self) -> Engine:
        """The same for what only reads."""
        return self._awaited.reader.sync_engine

    def make_engine(self) -> Engine:
        return self.engines.awaited(self.size)

    def start(self) -> None:
        """Look whether an Engine and Sessions can be made; connects to nothing."""
        options = self.engines.options
        with refused_as(InvalidSetting, f"{options.options_setting} cannot be used", options.engine_options):
            engine = self.make_engine()
            self._probe = engine.pool
            pool.max_connections(self._probe)
            str(select(literal(1)).compile(dialect=engine.dialect))
        self.sessions.check(engine)

    def describe_limit(self) -> str:
        """Return the most connections of this worker, for people."""
        counted = " among those that the ordinary tasks announce" if self.is_beside else ""
        return super().describe_limit() + counted

    def engines_made(self) -> list[Engine]:
        return [engine.sync_engine for engine in self._awaited.made()]

    def dispose(self) -> None:
        """Close the idle connections of this process, each on its event loop.

        Waited for is that of other threads' event loops, `DISPOSE_S` seconds at most, and of one whose greenlet calls.
        In a coroutine it only begins. An event loop that does not run now does it when it goes on, or at its end.
        """
        from sqlalchemy.util import await_only

        own, begun = _running_loop(), []
        for loop in self._awaited.loops():
            if loop is own and runs_in_greenlet():
                await_only(self._awaited.dispose())
            else:
                begun.append(self._begin_to_dispose(loop))
        if own is None:
            wait([one for one in begun if one is not None], DISPOSE_S)

    def recycle(self) -> None:
        """Let no connection that is open now serve another unit of work; idle ones are closed on their event loops."""
        self.dispose()  # what is in use is closed when it comes back

    def _begin_to_dispose(self, loop: asyncio.AbstractEventLoop) -> Future[None] | None:
        """Close the idle connections of `loop` soon; return what tells the end where another thread runs it now."""
        done: Future[None] = Future()

        def begin() -> None:
            task = ClosingTask(self._awaited.dispose(), loop=loop)
            task.add_done_callback(ended)

        def ended(task: asyncio.Task[None]) -> None:
            done.set_result(None)
            if not task.cancelled() and task.exception() is not None:
                logger.info("Idle connections could not be closed: %r", task.exception())

        runs = loop.is_running()
        with contextlib.suppress(RuntimeError):  # it has been closed meanwhile
            loop.call_soon_threadsafe(begin)
            return done if runs else None
        return None


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
