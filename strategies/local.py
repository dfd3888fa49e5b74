"""The strategy `local`."""

from __future__ import annotations

from sqlalchemy.engine import Engine

from .base import SessionStrategy


class LocalStrategy(SessionStrategy):
    """One Session per task request, on one Engine per process.

    The Session hangs on the unit of work itself: no registry, nothing to look up, nothing to remove.

    **Made for** solo and for worker pools that are not known; **correct under** every worker pool.
    **Not made for** code that expects a `scoped_session` (`Model.query`): use `scoped`.
    """

    name = "local"
    engine_lives = "the process; after a fork the child drops what it inherited"
    keyed_on = "the task request"
    released = "at the request's end"

    def make_engine(self) -> Engine:
        return self.engines.shared(self.size)
