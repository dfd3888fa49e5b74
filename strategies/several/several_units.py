"""One unit of work over several databases: a part on each, ended together.

The walk: the unit of work begins with its own database. What first asks for another one's Session adds a part, which is
a unit of work on that database. At the end all are prepared (flushed, and refused where a transaction is broken), then
committed one after another, then their callbacks run. Of two-phase commit, `two_phase` knows more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from time import monotonic
from typing import Any

from .._sqlalchemy import is_prepared
from ..base import SessionStrategy
from ..interrupts import shield
from ..unit_of_work import UnitOfWork
from . import two_phase
from .part import OneOfSeveral

logger: logging.Logger = logging.getLogger(__name__)


class Part(OneOfSeveral):
    """What a unit of work does on another database than its own; it ends with the whole."""

    _whole: OneOfSeveral

    @property
    def whole(self) -> OneOfSeveral:
        return self._whole

    @property
    def label(self) -> str:
        return f"{super().label} on the database {self.database!r}"


class SeveralUnits(OneOfSeveral):
    """A unit of work over several databases: its own, and a part on each of the others that it has used so far."""

    _parts: dict[object, tuple[int, Part]] | None = None
    part_class: type[Part] = Part

    @property
    def whole(self) -> OneOfSeveral:
        """Itself."""
        return self

    @property
    def parts(self) -> list[Part]:
        """The parts, without the whole, in the order they are committed in."""
        if self._parts is None:
            return []
        return [part for _, part in sorted(self._parts.values(), key=lambda entry: entry[0])]

    @property
    def all_units(self) -> Iterable[UnitOfWork]:
        return (self,) if self._parts is None else (self, *self.parts)

    @shield.covers
    def part_of(self, registry: Any, strategy: Callable[[], SessionStrategy], position: int) -> UnitOfWork:
        if self._parts is None:
            self._parts = {}
        found = self._parts.get(registry)
        if found is not None:
            return found[1]
        there = strategy()
        options = registry.options_like(self.options)
        part = self.part_class()
        part.strategy, part.options, part.registry, part.titled = there, options, registry, self.titled
        part.kind, part.holder, part.request, part.began = self.kind, self.holder, self.request, monotonic()
        part._whole = self
        if there.follows_units:
            there.enter(part)
        for hook in options.hooks:
            hook.begun(part)
        self._parts[registry] = (position, part)
        return part

    # -- the endings -------------------------------------------------------------------------------------------------

    @shield.covers
    def succeed(self, *, final: bool) -> None:
        """Commit all: the parts in the order of the databases, and the whole, whose messages wait, last.

        Raises:
            Exception: whatever a flush or a COMMIT failed with. What was not committed until then is rolled back; what
                was, stays, and the log names it.
        """
        if self._parts is None:
            super().succeed(final=final)
            return
        units: list[OneOfSeveral] = [*self.parts, self]
        ended: list[OneOfSeveral] = []
        try:
            # A time limit between two COMMITs would leave one database with the work and another without.
            with shield.quiet():
                for unit in units:
                    unit.flush()
                for hook in self.options.hooks:
                    hook.before_others(self)
                for unit in two_phase.prepared(units):
                    ended.append(unit)  # an error in its COMMIT has rolled it back
                    unit.end_well()
        except BaseException as error:
            self._fail_after(units, ended, error)
            raise
        self._after(units, final=final)

    def _fail_after(self, units: list[OneOfSeveral], ended: list[OneOfSeveral], error: BaseException) -> None:
        committed = [unit for unit in ended[:-1] if unit.outcome == "committed"]
        names = ", ".join(unit.database for unit in committed)
        prepared = [unit for unit in units if unit.opened is not None and is_prepared(unit.opened)]
        if ended and ended[-1].must_discard():
            # The second phase has begun, and how far it came is not known: they end as the decider has ended.
            for unit in prepared:
                unit.stays_prepared = True
        self.fail(error)
        if any(unit.must_discard() for unit in units):
            logger.error(
                "%s failed with %s between the two phases of its COMMIT: its transactions may be prepared still, and "
                "hold their locks until `celery alchemy in-doubt --resolve` ends them, all in the same way.",
                self.label, type(error).__name__,
            )  # fmt: skip
        elif committed:
            logger.error(
                "%s failed in the COMMIT of %s with %s, after that of %s: what is committed stays, the rest is rolled "
                "back. alchemy_two_phase = True lets all be committed, or none.",
                self.label, ended[-1].database, type(error).__name__, names,
            )  # fmt: skip
        try:
            self._after(committed, final=False)
        except Exception:
            logger.exception("%s: an on_commit callback failed too", self.label)

    def _after(self, units: Sequence[UnitOfWork], *, final: bool) -> None:
        if final:
            self.close()
        for unit in units:
            unit.run_waiting()

    def prepare(self) -> None:
        """Flush all, and refuse a transaction that is broken, before any COMMIT."""
        if self._parts is None:
            super().prepare()
            return
        for unit in (*self.parts, self):
            unit.flush()

    def fail(self, error: BaseException) -> None:
        """Roll back all."""
        if self._parts is None:
            super().fail(error)
            return
        with ExitStack() as stack:
            for unit in (self, *self.parts):
                stack.callback(unit.fail_alone, error)

    def after_end(self, error: BaseException | None) -> None:
        super().after_end(error)
        for part in self.parts:
            if part.strategy.follows_units:
                part.strategy.leave(part)

    def close(self) -> None:
        """Release all Sessions."""
        with ExitStack() as stack:
            for unit in (self, *self.parts):
                stack.callback(UnitOfWork.close, unit)
