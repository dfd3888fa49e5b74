"""The strategy `local`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from .base import SessionStrategy

if TYPE_CHECKING:
    from .unit_of_work import UnitOfWork


class LocalStrategy(SessionStrategy):
    """One Session per task request, on one Engine per process.

    The Session hangs on the unit of work itself: no registry, nothing to look up, nothing to remove.

    **Made for** solo and for worker pools nobody knows; **right under** every worker pool.
    **Not made for** code that expects a `scoped_session` (`Model.query`): take `scoped`.
    """

    name = "local"
    engine_lives = "the process; after a fork the child drops what it inherited"
    keyed_on = "the task request"
    released = "at the request's end"

    def make_engine(self) -> Engine:
        return self.engines.shared(self.size)

    def open(self, unit: UnitOfWork) -> Session:
        return self.new_session()
