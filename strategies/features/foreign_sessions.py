"""Callables that wait for the COMMIT of a Session that is not ours: a web application's."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction, scoped_session

from .. import lost_work
from .._sqlalchemy import is_committing, is_preparing, listen_to, root_of, savepoint_of
from ..core_transactions import follow_connections
from ..errors import CeleryAlchemyError
from ..names import type_of
from ..on_commit import Callback, heir_of
from ..sessions import OWNER, owner_of, watch_commits
from ..unit_of_work import UnitOfWork
from . import on_event_loop
from .foreign_callbacks import CLOSES, ForeignCallbacks

logger: logging.Logger = logging.getLogger(__name__)


class Watched:
    """Stands in `Session.info` where a unit of work stands for a Session of ours: what waits for its COMMIT."""

    def __init__(self) -> None:
        self.committed: SessionTransaction | None = None
        self.waiting: ForeignCallbacks = ForeignCallbacks()

    connected = 0
    opened: Session | None = None

    def rolled_back(self) -> None:
        """Only a Session of ours tells of that."""

    def follow_transactions(self) -> None:
        """It follows them already."""

    def follow_connections(self) -> None:
        """The same."""

    def closing(self, session: Session) -> None:
        """Its owner may close it."""

    def forget_session(self) -> None:
        """It is its owner's."""

    def refuse_failed(self, session: Session) -> None:
        """Leave it to the owner."""

    def explained(self, error: Exception, transaction: SessionTransaction | None) -> BaseException:
        """Leave errors to the owner."""
        return error

    def listener_failed(self, error: Exception) -> None:
        """Leave them to the owner."""
        raise error


def on_commit_of(session: Any, callback: Callback, *, raises: bool = False, unasked: bool = False) -> None:
    """Run `callback()` after the next real COMMIT of `session`; drop it when that is rolled back or closed instead.

    Begins the transaction, where there is none yet; `session.begin()` then returns that one. Under an AsyncSession
    `callback` runs in a thread, and `await session.commit()` waits for it; one that is `async def` is awaited.

    Args:
        session: A Session, a `scoped_session` (Flask-SQLAlchemy's `db.session`), or an AsyncSession.
        raises: The error of `callback` is raised to the caller of commit, not only logged.
        unasked: The caller has not asked for a COMMIT, a setting has: where the Session is closed and has written
            nothing, `callback` runs then.
    Raises:
        CeleryAlchemyError: it is none of these.
    """
    found = plain_session(session)
    if not is_async(session):
        refuse_coroutine(callback)
    unit = owner_of(found)
    if isinstance(unit, UnitOfWork):
        unit.on_commit(callback, raises=raises)
        return
    savepoint = savepoint_of(found)
    releasing = is_committing(found)
    if releasing and savepoint is None:
        ForeignCallbacks().committed(root_of(found), callback, raises=raises)
        return
    if unit is None:
        unit = _watch(found)
    if not is_preparing(found) and not event.contains(found, "before_commit", _before_commit):
        event.listen(found, "before_commit", _before_commit)
    if not found.in_transaction():
        # A Session that has done nothing yet ends without an event: what waits would go out with its next COMMIT.
        _begin_for_owner(found)
    if releasing and savepoint is not None:
        savepoint = heir_of(savepoint)
    assert unit.waiting is not None
    unit.waiting.add(callback, savepoint, raises=raises, within=follow_connections(found))
    if unasked and isinstance(unit, Watched):
        unit.waiting.keep_if_nothing_is_lost(callback)
        _look_before_close(found, unit.waiting)


def _watch(session: Session) -> Watched:
    watched = Watched()
    setattr(session, OWNER, watched)
    watch_commits(session)
    watched.waiting.is_committing = is_preparing(session)
    listen_to(session, "after_rollback", _after_rollback)
    listen_to(session, "after_begin", _after_begin)
    return watched


def _before_commit(session: Session) -> None:
    watched = owner_of(session)
    if isinstance(watched, Watched) and savepoint_of(session) is None:
        watched.waiting.is_committing = True


def _after_begin(session: Session, *_: Any) -> None:
    """It has a connection now, which its owner may commit."""
    watched = owner_of(session)
    if isinstance(watched, Watched) and watched.waiting.all_of_them():
        follow_connections(session)


def _after_rollback(session: Session) -> None:
    watched = owner_of(session)
    if isinstance(watched, Watched) and savepoint_of(session) is None:
        watched.waiting.expect_rollback()


def expect_rollback(session: Any, error: BaseException) -> None:
    """The code that uses `session` has raised `error`: that nothing is committed is no news; that a COMMIT was cut off
    is."""
    with contextlib.suppress(Exception):  # a scoped_session may have none to give any more; the exception counts
        if not isinstance(session, scoped_session) or session.registry.has():
            found = plain_session(session)
            watched = owner_of(found)
            if (
                isinstance(watched, Watched)
                and root_of(found) is not None
                and (isinstance(error, Exception) or not watched.waiting.is_committing)
            ):
                watched.waiting.expect_rollback()


def _begin_for_owner(session: Session) -> None:
    """Begin the transaction of `session`, and let its owner's own `begin()` find it: SQLAlchemy refuses a second."""
    begun = session.begin()

    def begin(nested: bool = False) -> SessionTransaction:
        vars(session).pop("begin", None)
        return begun if not nested and root_of(session) is begun else session.begin(nested)

    session.begin = begin  # type: ignore[method-assign]


def _look_before_close(session: Session, waiting: ForeignCallbacks) -> None:
    """Look, before `session` is closed without a COMMIT, whether that loses anything: afterwards nothing tells."""

    def looking(name: str) -> Callable[[], None]:
        def end() -> None:
            vars(session).pop(name, None)
            waiting.loses_nothing = not _loses_work(session)
            try:
                getattr(session, name)()
            finally:
                waiting.loses_nothing = False

        return end

    for name in CLOSES:
        vars(session).setdefault(name, looking(name))


def _loses_work(session: Session) -> bool:
    try:
        return lost_work.loses_work(session)
    except Exception:
        logger.debug("%r does not tell whether it has written", session, exc_info=True)
        return True


def refuse_coroutine(callback: Any) -> None:
    """Refuse `callback` if it is `async def`, where nothing could await it.

    Raises:
        CeleryAlchemyError: it is.
    """
    if not on_event_loop.is_coroutine_function(callback):
        return
    raise CeleryAlchemyError(
        f"on_commit got {getattr(callback, '__qualname__', callback)!r}, an `async def` function: it is awaited after "
        f"the COMMIT of an AsyncSession only, and here is none. Follow one with db.follow(), pass it as session=, or "
        f"give an ordinary function."
    )


def check_session(session: Any) -> None:
    """Refuse what has no COMMIT to wait for.

    Raises:
        CeleryAlchemyError: it is no Session, `scoped_session` or AsyncSession.
    """
    if not isinstance(session, scoped_session) and not is_async(session):
        plain_session(session)


def belongs_to_unit(session: Any) -> bool:
    """Tell whether `session` is a Session of a unit of work."""
    return isinstance(session, Session) and isinstance(owner_of(session), UnitOfWork)


def plain_session(session: Any) -> Session:
    """Return the Session itself, of a `scoped_session` or an AsyncSession."""
    if isinstance(session, scoped_session) or _is_async_scoped(session):
        session = session()
    session = getattr(session, "sync_session", session)
    if not isinstance(session, Session):
        raise CeleryAlchemyError(
            f"session is {type_of(session)}, which has no COMMIT to wait for. Give a sqlalchemy.orm.Session, a "
            f"scoped_session or an AsyncSession."
        )
    return session


def is_async(session: Any) -> bool:
    """Tell whether it is an AsyncSession, or a scoped_session of those."""
    return hasattr(session, "sync_session") or _is_async_scoped(session)


def _is_async_scoped(session: Any) -> bool:
    asynchronous = sys.modules.get("sqlalchemy.ext.asyncio")
    return asynchronous is not None and isinstance(session, asynchronous.async_scoped_session)
