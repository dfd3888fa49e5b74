"""Whom a Session belongs to."""

from __future__ import annotations

from typing import Protocol

from sqlalchemy.orm import Session, SessionTransaction

from .on_commit import CommitCallbacks


class Owner(Protocol):
    """Whom a Session belongs to: a unit of work, or what waits for the COMMIT of a Session that is not ours."""

    @property
    def waiting(self) -> CommitCallbacks | None:
        """What waits for its COMMIT; None when nothing does."""

    committed: SessionTransaction | None
    """The transaction or savepoint whose COMMIT or RELEASE has just succeeded."""

    connected: int
    """Above 0: the Session has a connection."""

    opened: Session | None
    """The Session; None once it is released."""

    def rolled_back(self) -> None:
        """The Session was rolled back by hand."""

    def follow_transactions(self) -> None:
        """A transaction of the Session may be ended by other code from now on."""

    def follow_connections(self) -> None:
        """A Connection of the Session is given to other code, which may end its transaction from now on."""

    def closing(self, session: Session) -> None:
        """Code closes the Session or its transaction, not its own to close; what is not committed is lost."""

    def forget_session(self) -> None:
        """The Session is closed: open a new one on next use."""

    def refuse_failed(self, session: Session) -> None:
        """Refuse to commit a transaction that has failed before."""

    def explained(self, error: Exception, transaction: SessionTransaction | None) -> BaseException:
        """Return what is to be raised instead of `error`, with which a COMMIT has failed."""

    def listener_failed(self, error: Exception) -> None:
        """The COMMIT has succeeded, and a listener of the user's has failed after it."""
