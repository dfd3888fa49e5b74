"""The Sessions of units of work under prefork, where a soft time limit may strike between any two bytecodes."""

from __future__ import annotations

from sqlalchemy import event
from sqlalchemy.orm import Mapper

from .interrupts import shield
from .sessions import UnitSession, owner_of


class DeferringSession(UnitSession):
    """The same for prefork: commit, rollback and close are never cut in two by a soft time limit.

    An interrupted COMMIT would be reported as a failure although the server has committed.
    """

    def commit(self) -> None:
        self._follow_own_commit()
        owner = owner_of(self)
        callbacks = owner.waiting if owner is not None else None
        if shield.depth and (callbacks is None or callbacks.held_back):
            super().commit()  # its unit of work ends, and holds the limit back
            return
        # Flushing may take long, and a time limit is right to stop it; the COMMIT itself is one answer.
        self.flush()
        if callbacks is not None:
            callbacks.held_back += 1
        shield.hold()
        try:
            super().commit()
        finally:
            shield.let_go()
            if callbacks is not None:
                callbacks.held_back -= 1
        if callbacks is not None:
            callbacks.run_ready()
        shield.check()

    def rollback(self) -> None:
        with shield:
            super().rollback()

    def close(self) -> None:
        if shield.depth:
            super().close()
            return
        with shield:
            super().close()


def shield_mapper_configuration() -> None:
    """Defer time limits while SQLAlchemy configures the mappers, at the first use of a model in a process.

    Cut in two, the configuration would leave the mappers unusable for good: every later task of the process would fail
    with "One or more mappers failed to initialize".
    """
    if not event.contains(Mapper, "before_configured", shield.hold):
        event.listen(Mapper, "before_configured", shield.hold)
        # Does not fire when the configuration fails; the end of the task lets go then.
        event.listen(Mapper, "after_configured", shield.let_go)
