"""The Sessions of units of work under prefork, where a soft time limit may strike between any two bytecodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Mapper, SessionTransaction

from .interrupts import shield
from .options import DatabaseOptions
from .sessions import UnitSession, UnitTransaction, owner_of


class DeferringSession(UnitSession):
    """The same for prefork: commit, rollback and close are never cut in two by a soft time limit.

    An interrupted COMMIT would be reported as a failure although the server has committed.
    """

    def commit(self) -> None:
        self._follow_own_commit()
        self.commit_held(super().commit)

    def commit_held(self, commit: Callable[[], None]) -> None:
        """Call `commit`, which commits: a time limit waits for its end."""
        owner = owner_of(self)
        callbacks = owner.waiting if owner is not None else None
        if shield.depth and (callbacks is None or callbacks.held_back):
            commit()  # its unit of work ends, and holds the limit back
            return
        # Flushing may take long, and a time limit is right to stop it; the COMMIT itself is one answer.
        self.flush()
        if callbacks is not None:
            callbacks.held_back += 1
        shield.hold()
        try:
            commit()
        finally:
            shield.let_go()
            if callbacks is not None:
                callbacks.held_back -= 1
        if callbacks is not None:
            callbacks.run_ready()
        shield.check_later()

    def rollback(self) -> None:
        with shield.quiet():
            super().rollback()
        shield.check_later()

    def close(self) -> None:
        if shield.depth:
            super().close()
            return
        with shield.quiet():
            super().close()
        shield.check_later()  # after a COMMIT, which a hand-written task closes its Session after, it has ended well

    def _hand_out(self, transaction: SessionTransaction | None = None) -> None:
        super()._hand_out(transaction)
        if transaction is not None:
            transaction.__class__ = DeferringTransaction


class DeferringTransaction(UnitTransaction):
    """What `Session.begin()` returns: its COMMIT is not cut either."""

    def commit(self, _to_root: bool = False) -> None:
        commit = functools.partial(super().commit, _to_root)
        session: Any = self.session
        if self.nested and not _to_root:
            commit()
        else:
            session.commit_held(commit)


def hold_limits_in_commits(engine: Engine, options: DatabaseOptions) -> None:
    """EngineHook: no time limit cuts a COMMIT that no Session of ours sends, `Connection.commit()` for example."""
    dialect: Any = engine.dialect
    commit, commit_twophase = dialect.do_commit, dialect.do_commit_twophase

    @shield.covers
    def do_commit(connection: Any) -> None:
        if shield.depth or not shield.applies:
            commit(connection)
            return
        shield.depth += 1
        try:
            commit(connection)
        finally:
            shield.depth -= 1
        shield.check_later()

    @shield.covers
    def do_commit_twophase(*args: Any, **keywords: Any) -> None:
        if shield.depth or not shield.applies:
            commit_twophase(*args, **keywords)
            return
        shield.depth += 1
        try:
            commit_twophase(*args, **keywords)
        finally:
            shield.depth -= 1
        shield.check_later()

    dialect.do_commit, dialect.do_commit_twophase = do_commit, do_commit_twophase


def shield_mapper_configuration() -> None:
    """Defer time limits while SQLAlchemy configures the mappers, at the first use of a model in a process.

    Cut in two, the configuration would leave the mappers unusable for good: every later task of the process would fail
    with "One or more mappers failed to initialize".
    """
    if not event.contains(Mapper, "before_configured", shield.hold):
        event.listen(Mapper, "before_configured", shield.hold)
        # Does not fire when the configuration fails; the end of the task lets go then.
        event.listen(Mapper, "after_configured", shield.let_go)
