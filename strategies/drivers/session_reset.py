"""The seam for setting back what the server keeps of a connection's session."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.pool import ConnectionPoolEntry

NOTES = "celery_alchemy.session_notes"
"""Key in `ConnectionPoolEntry.info`: what was seen while its connection was made."""


class SessionReset(ABC):
    """Sets a session back to what it was when its connection was new, `connect` listeners included."""

    rolls_back = False
    """`reset` ends an open transaction too, by a rollback."""

    def listen(self, engine: Engine) -> None:  # noqa: B027 - a hook, not a duty
        """Put the listeners on `engine` that are needed."""

    def made(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> None:  # noqa: B027 - a hook, not a duty
        """Look at a connection that was just made, before any listener has."""

    @abstractmethod
    def remember(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> Any:
        """Return what `reset` needs to know, once all listeners are through. A round trip or more."""

    @abstractmethod
    def reset(self, dbapi_connection: Any, remembered: Any) -> None:
        """Set the session back, outside of any transaction. A round trip; where it fails, it raises."""
