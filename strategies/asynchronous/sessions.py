"""The Sessions of coroutines: an AsyncSession around the Session of the unit of work."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import concurrency

from .._sqlalchemy import options_of, streams
from ..errors import SharedSession
from ..options import DatabaseOptions
from ..sessions import UnitSession, UnitTransaction, owner_of
from .hosting import check_later, held


class AwaitingSession(UnitSession):
    """The Session inside an AsyncSession: one coroutine's, and no time limit cuts its COMMIT."""

    def get_bind(self, *args: Any, **keywords: Any) -> Engine | Connection:
        self._refuse_others()
        return super().get_bind(*args, **keywords)

    def flush(self, *args: Any, **keywords: Any) -> None:
        self._refuse_others()  # before there is a transaction of the flush, which would be broken then
        super().flush(*args, **keywords)

    def begin(self, nested: bool = False) -> SessionTransaction:
        self._refuse_others()
        return super().begin(nested)

    def commit(self) -> None:
        self._refuse_others()
        self.commit_held(super().commit)

    def commit_held(self, commit: Callable[[], None]) -> None:
        """Call `commit`, which commits: a time limit waits for its end."""
        owner = owner_of(self)
        callbacks = owner.waiting if owner is not None else None
        if callbacks is not None and callbacks.held_back:
            commit()  # its unit of work ends, and holds the limit back
            return
        self._follow_own_commit()
        # Flushing may take long, and a time limit is right to stop it; the COMMIT itself is one answer.
        self.flush()
        if callbacks is not None:
            callbacks.held_back += 1
        try:
            with held():
                commit()
        finally:
            if callbacks is not None:
                callbacks.held_back -= 1
        if callbacks is not None:
            callbacks.run_ready()
        check_later()

    def rollback(self) -> None:
        self._refuse_others()
        super().rollback()

    def _hand_out(self, transaction: SessionTransaction | None = None) -> None:
        super()._hand_out(transaction)
        if transaction is not None:
            transaction.__class__ = AwaitingTransaction

    def _close_impl(self, *args: Any, **keywords: Any) -> None:
        owner: Any = self.celery_alchemy_owner
        if owner is not None and owner.opened is self:
            self._refuse_others()
        super()._close_impl(*args, **keywords)

    def _refuse_others(self) -> None:
        owner: Any = self.celery_alchemy_owner
        if owner is None or owner.task is None or owner.task is asyncio.current_task():
            return
        raise SharedSession(
            f"The Session of {owner.label} was used by another coroutine than the one that it belongs to: by one that "
            f"asyncio.gather(), a TaskGroup, create_task() or shield() has started, or wait_for() in Python 3.11 "
            f"(write `async with asyncio.timeout(...):`). A Session does one thing at a time. In that coroutine, "
            f"write `async with db.async_unit_of_work() as session:`, or await one after the other."
        )


class AwaitingTransaction(UnitTransaction):
    """What `AsyncSession.begin()` is around: its COMMIT is not cut either."""

    def commit(self, _to_root: bool = False) -> None:
        commit = functools.partial(super().commit, _to_root)
        if self.nested:
            commit()
        else:
            self.session.commit_held(commit)  # type: ignore[attr-defined]


def hold_limits_in_awaited_commits(engine: Engine, options: DatabaseOptions) -> None:
    """EngineHook: no time limit cuts a COMMIT that no Session of ours sends, `AsyncConnection.commit()` for example."""
    dialect: Any = engine.dialect
    commit, commit_twophase = dialect.do_commit, dialect.do_commit_twophase

    def do_commit(connection: Any) -> None:
        with held():
            commit(connection)
        check_later()

    def do_commit_twophase(*args: Any, **keywords: Any) -> None:
        with held():
            commit_twophase(*args, **keywords)
        check_later()

    dialect.do_commit, dialect.do_commit_twophase = do_commit, do_commit_twophase


class UnitAsyncSession(AsyncSession):
    """AsyncSession whose calls need no greenlet of their own where a greenlet hosts the coroutine: the same work for a
    quarter less."""

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        await self.close()  # here, where it is known whose code does so; SQLAlchemy lets another asyncio task do it


def around(session: Session) -> AsyncSession:
    """Return an AsyncSession around `session`."""
    kind: Any = lambda **_: session  # noqa: E731
    return UnitAsyncSession(sync_session_class=kind)


def _in_place(name: str) -> Any:
    """Return the method `name` of AsyncSession, called in place where a greenlet hosts the coroutine."""
    spawned = getattr(AsyncSession, name)

    @functools.wraps(spawned)
    async def call(self: AsyncSession, *args: Any, **keywords: Any) -> Any:
        if concurrency.in_greenlet() and not _streams(args, keywords):
            return getattr(self.sync_session, name)(*args, **keywords)
        return await spawned(self, *args, **keywords)

    return call


def _streams(args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Tell whether a server-side cursor is asked for, which SQLAlchemy refuses here."""
    return streams(keywords.get("execution_options")) or (bool(args) and streams(options_of(args[0])))


for _name in (
    *("close", "commit", "delete", "execute", "flush", "get", "get_one", "invalidate", "merge", "refresh", "reset"),
    *("rollback", "scalar", "scalars"),
):
    setattr(UnitAsyncSession, _name, _in_place(_name))
