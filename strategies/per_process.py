"""The strategy `per_process`."""

from __future__ import annotations

from sqlalchemy.engine import Engine

from .base import SessionStrategy
from .worker_pool import NO_WORKER


class PerProcessStrategy(SessionStrategy):
    """One Session per task request, on an Engine made anew in each pool process after the fork.

    Before there is a pool process (prefork's main process, a script), the Engine is one without a connection pool, so
    that no fork inherits an open connection; what code has put on it (listeners, execution options) the next one gets
    too. An Engine that the user brought keeps its identity and its listeners, and its connection pool begins anew
    after the fork.

    **Made for** prefork; **correct under** every worker pool, where the one process counts as the pool process.
    **Not made for** code that keeps `db.engine` in a variable across the fork, or in a `sessionmaker`: a warning names
    the line; use `local`.
    """

    name = "per_process"
    keeps_engine = False
    engine_lives = "the pool process: made anew after the fork, disposed at process shutdown"
    keyed_on = "the task request"
    released = "at the request's end"

    def make_engine(self) -> Engine:
        if self.worker_pool.in_main_process or self.worker_pool.name == NO_WORKER:
            return self.engines.unpooled()
        return self.engines.pooled(self.size)

    def after_fork(self) -> None:
        super().after_fork()
        self.engines.leave((self._engine, self._read_engine))
        self._engine = self._read_engine = None
