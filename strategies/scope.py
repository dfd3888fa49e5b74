"""Who is running: the current thread or greenlet, and what belongs to it alone."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any

try:
    # A thread that runs no greenlets has a main greenlet of its own, so this one call tells threads and greenlets
    # apart, monkey patched or not. Celery and SQLAlchemy 2.0 look at it the same way.
    from greenlet import getcurrent as current_scope
except ImportError:  # no greenlet installed: nothing here can run one
    from threading import current_thread as current_scope

__all__ = [
    "SCOPE", "Scope", "current_scope", "describe_current_scope", "forget_after_fork", "here", "living_scopes", "scopes",
]  # fmt: skip

SCOPE = "_celery_alchemy"
"""Attribute of a thread or greenlet: its Scope, where it has one."""


class Scope:
    """What belongs to one thread or greenlet, for all `Alchemy` objects of the process: nesting is a matter of the
    thread, not of the database.

    It is an attribute of the thread's or greenlet's own object. That is the weakest possible hold: there is no table
    whose keys could be reused by the next greenlet (`id()`, `get_ident()`), none that grows when a greenlet dies, and
    nothing that `contextvars.copy_context()` could carry into another thread.
    """

    __slots__ = ("__weakref__", "commits", "connecting", "ends", "held", "units")

    def __init__(self) -> None:
        self.units: list[Any] = []
        """The entries of its open units of work, the innermost last."""
        self.held: list[Any] = []
        """The pool records of the connections that it has checked out, oldest first."""
        self.connecting: Any = None
        """The unit of work whose Session has asked for a connection, and has none yet."""
        self.commits: int = 0
        """COMMITs so far of what may have written."""
        self.ends: int = 0
        """Transactions so far that code has ended, and that may have been committed so."""


#: Those of the threads and greenlets that are alive; weakly, for a greenlet that dies takes its own along.
scopes: set[weakref.ref[Scope]] = set()


def here() -> Scope:
    """Return the Scope of the current thread or greenlet; made where there is none."""
    owner: Any = current_scope()
    scope: Scope | None = getattr(owner, SCOPE, None)
    if scope is None:
        scope = Scope()
        setattr(owner, SCOPE, scope)
        scopes.add(weakref.ref(scope, scopes.discard))
    return scope


def living_scopes() -> list[Scope]:
    """Return those of all threads and greenlets of this process that are alive."""
    while True:
        try:
            return [scope for reference in list(scopes) if (scope := reference()) is not None]
        except RuntimeError:  # another thread has begun or ended meanwhile
            continue


def describe_current_scope() -> str:
    """Name the current thread or greenlet for a message."""
    return f"{threading.current_thread().name!r} ({type(current_scope()).__name__} {id(current_scope()):#x})"


def forget_after_fork() -> None:
    """Begin anew in the child of a fork: what was open belongs to the parent, and is not even looked at."""
    scopes.clear()
    with contextlib.suppress(AttributeError):
        delattr(current_scope(), SCOPE)
