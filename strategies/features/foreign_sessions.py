"""Callables that wait for the COMMIT of a Session that is not ours: a web application's."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session, SessionTransaction, scoped_session

from .._sqlalchemy import is_committing, savepoint_of
from ..errors import CeleryAlchemyError
from ..on_commit import Callback, CommitCallbacks, heir_of
from ..sessions import OWNER, owner_of, watch_commits
from ..unit_of_work import UnitOfWork


class Watched:
    """Stands in `Session.info` where a unit of work stands for a Session of ours: what waits for its COMMIT."""

    def __init__(self) -> None:
        self.committed: SessionTransaction | None = None
        self.waiting: CommitCallbacks = CommitCallbacks(_run)

    connected = 0
    opened: Session | None = None

    def rolled_back(self) -> None:
        """Only a Session of ours tells of that."""

    def follow_transactions(self) -> None:
        """It follows them already."""


def on_commit_of(session: Any, callback: Callback, *, raises: bool = False) -> None:
    """Run `callback()` after the next real COMMIT of `session`; drop it when that is rolled back or closed instead.

    Begins the transaction, where there is none yet.

    Args:
        session: A Session, a `scoped_session` (Flask-SQLAlchemy's `db.session`), or an AsyncSession.
        raises: The error of `callback` is raised to the caller of commit, not only logged.
    Raises:
        CeleryAlchemyError: it is none of these.
    """
    found = plain_session(session)
    unit = owner_of(found)
    if isinstance(unit, UnitOfWork):
        unit.on_commit(callback, raises=raises)
        return
    savepoint = savepoint_of(found)
    releasing = is_committing(found)
    if releasing and savepoint is None:
        CommitCallbacks(_run).run_now(callback, raises=raises)
        return
    if unit is None:
        unit = Watched()
        setattr(found, OWNER, unit)
        watch_commits(found)
    if not found.in_transaction() and found.autobegin:
        # A Session that has done nothing yet ends without an event: what waits would go out with its next COMMIT.
        found.begin()
    if releasing and savepoint is not None:
        savepoint = heir_of(savepoint)
    assert unit.waiting is not None
    unit.waiting.add(callback, savepoint, raises=raises)


def _run(callback: Callback) -> None:
    callback()


def plain_session(session: Any) -> Session:
    """Return the Session itself, of a `scoped_session` or an AsyncSession."""
    if isinstance(session, scoped_session):
        session = session()
    session = getattr(session, "sync_session", session)
    if not isinstance(session, Session):
        raise CeleryAlchemyError(
            f"session is a {type(session).__name__}, which has no COMMIT to wait for. Give a sqlalchemy.orm.Session, a "
            f"scoped_session or an AsyncSession."
        )
    return session
