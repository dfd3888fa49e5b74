"""One unit of work over several databases: a part on each, ended together.

The walk: the unit of work begins with its own database. What first asks for another one's Session adds a part, which is
a unit of work on that database. At the end all are prepared (flushed, and refused where a transaction is broken), then
committed one after another, then their callbacks run. Of two-phase commit, `two_phase` knows more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ..interrupts import shield
from ..sessions import is_prepared
from . import two_phase

if TYPE_CHECKING:
    from ..unit_of_work import UnitOfWork

logger = logging.getLogger(__name__)


class Parts:
    """The units of work on other databases that `whole` has used so far.

    Args:
        whole: The unit of work that owns them, itself the one on its own database.
    """

    __slots__ = ("_by_owner", "whole")

    def __init__(self, whole: UnitOfWork) -> None:
        self.whole = whole
        self._by_owner: dict[object, tuple[int, UnitOfWork]] = {}

    def get(self, owner: object) -> UnitOfWork | None:
        """Return the part on the database of `owner`; None where there is none yet."""
        found = self._by_owner.get(owner)
        return found[1] if found is not None else None

    def add(self, owner: object, position: int, part: UnitOfWork) -> None:
        """Add the part on the database of `owner`, whose place in the commit order is `position`."""
        self._by_owner[owner] = (position, part)

    def __iter__(self) -> Iterator[UnitOfWork]:
        """The parts, without the whole, in the order they are committed in."""
        return (part for _, part in sorted(self._by_owner.values(), key=lambda entry: entry[0]))

    @shield.covers
    def succeed(self, *, final: bool) -> None:
        """Commit all: the parts in the order of the databases, and the whole, whose messages wait, last.

        Raises:
            Exception: whatever a flush or a COMMIT failed with. What was not committed until then is rolled back; what
                was, stays, and the log names it.
        """
        units = [*self, self.whole]
        ended: list[UnitOfWork] = []
        try:
            # A time limit between two COMMITs would leave one database with the work and another without.
            with shield.quiet():
                self.prepare()
                for unit in two_phase.prepared(units):
                    ended.append(unit)  # an error in its COMMIT has rolled it back
                    unit.end_well()
        except BaseException as error:
            self._fail_after(units, ended, error)
            raise
        self._after(units, final=final)

    def _fail_after(self, units: list[UnitOfWork], ended: list[UnitOfWork], error: BaseException) -> None:
        committed = [unit for unit in ended[:-1] if unit.outcome == "committed"]
        names = ", ".join(unit.database for unit in committed)
        prepared = [unit for unit in units if unit.opened is not None and is_prepared(unit.opened)]
        if ended and ended[-1].stays_prepared:
            # The second phase has begun, and nobody knows how far it came: they end as the decider has ended.
            for unit in prepared:
                unit.stays_prepared = True
        self.whole.fail(error)
        if any(unit.stays_prepared for unit in units):
            logger.error(
                "%s failed with %s between the two phases of its COMMIT: its transactions may be prepared still, and "
                "hold their locks until `celery alchemy in-doubt --resolve` ends them, all in the same way.",
                self.whole.label, type(error).__name__,
            )  # fmt: skip
        elif committed:
            logger.error(
                "%s failed in the COMMIT of %s with %s, after that of %s: what is committed stays, the rest is rolled "
                "back. alchemy_two_phase = True lets all be committed, or none.",
                self.whole.label, ended[-1].database, type(error).__name__, names,
            )  # fmt: skip
        try:
            self._after(committed, final=False)
        except Exception:
            logger.exception("%s: an on_commit callback failed too", self.whole.label)

    def _after(self, units: list[UnitOfWork], *, final: bool) -> None:
        if final and any(unit.waiting is not None for unit in units):
            self.whole.close()
        for unit in units:
            unit.run_waiting()

    def prepare(self) -> None:
        """Flush all, and refuse a transaction that is broken, before any COMMIT."""
        for unit in (*self, self.whole):
            unit.prepare_own(flush=True)

    def fail(self, error: BaseException) -> None:
        """Roll back all, the one that decides for the others (`two_phase`) last."""
        with ExitStack() as stack:
            for unit in two_phase.decider_first([*self, self.whole]):
                stack.callback(unit.fail_own, error)

    def close(self) -> None:
        """Release all Sessions."""
        with ExitStack() as stack:
            for unit in (self.whole, *self):
                stack.callback(unit.close_own)
