"""Units of work under prefork, where a soft time limit may strike between any two bytecodes.

It is held back while a Session is opened, while a transaction ends and while a Session is released: so either the work
is committed and stays so, or it is rolled back and the limit is raised.
"""

from __future__ import annotations

import logging

from sqlalchemy.orm import Session

from ._sqlalchemy import connections_of, record_of
from .engines.blocked import blocked_statements
from .interrupts import is_interrupt, shield
from .names import counted
from .unit_of_work import UnitOfWork

logger: logging.Logger = logging.getLogger(__name__)


class DeferringUnit(UnitOfWork):
    """A unit of work whose endings no soft time limit cuts in two; mixed in before the class that ends it."""

    @property
    def session(self) -> Session:
        """The Session of this unit of work, opened on first use; it connects with its first statement."""
        if self.opened is None and (
            self.strategy._engine is None or self.strategy.new_session is None or self.options.hooks
        ):
            with shield:  # a pool process makes its Engine now, or code of others opens the Session
                return super().session
        return super().session

    @shield.covers
    def end_well(self) -> None:
        if shield.depth:  # whoever holds the limit back has prepared it, and ends it
            super().end_well()
            return
        try:
            self.prepare()
        except BaseException as error:
            self.fail_alone(error)
            raise
        with shield.quiet():
            super().end_well()

    @shield.covers
    def run_waiting(self) -> None:
        if self.waiting is None:
            return
        if not (shield.applies and shield.depth):
            super().run_waiting()
            return
        # At the end of a task the limit is held back, but callbacks send messages, and sending may hang.
        shield.depth -= 1
        try:
            super().run_waiting()
        except Exception as error:
            if not is_interrupt(error):
                raise
            logger.warning("%s: %s in an on_commit callback; its work is committed", self.label, type(error).__name__)
        finally:
            shield.depth += 1

    @shield.covers
    def fail(self, error: BaseException) -> None:
        with shield.quiet():
            super().fail(error)

    @shield.covers
    def fail_alone(self, error: BaseException) -> None:
        with shield.quiet():
            super().fail_alone(error)

    def must_discard(self) -> bool:
        session = self.opened
        held = connections_of(session) if session is not None else []
        stopped = [
            blocked_statements.was_stopped(record_of(connection.connection))
            for connection in held
            if not connection.closed and not connection.invalidated
        ]
        return super().must_discard() or any(stopped)

    @shield.covers
    def close(self) -> None:
        if shield.depth:
            super().close()
            return
        with shield.quiet():
            super().close()

    @shield.covers
    def after_end(self, error: BaseException | None) -> None:
        super().after_end(error)
        if self.outermost and error is not None and is_interrupt(error):
            with shield.quiet():
                taken = sum(unit.strategy.take_back() for unit in self.all_units)
            if taken:
                logger.info(
                    "%s: %s taken back after %s", self.label, counted(taken, "connection"), type(error).__name__
                )
