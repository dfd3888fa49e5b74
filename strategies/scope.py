"""Who is running: the current thread or greenlet, and what belongs to it alone."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from typing import Any

from sqlalchemy.util import concurrency

from ._sqlalchemy import may_await
from .place import current_coroutine

try:
    # A thread that runs no greenlets has a main greenlet of its own, so this one call tells threads and greenlets
    # apart, monkey patched or not. Celery and SQLAlchemy 2.0 look at it the same way.
    from greenlet import getcurrent as current_scope
except ImportError:  # no greenlet installed: nothing here can run one
    from threading import current_thread as current_scope

__all__ = [
    "SCOPE", "Scope", "begin_hosting", "current_scope", "describe_current_scope", "forget_after_fork", "here",
    "living_scopes", "own_scope", "runs_in_greenlet", "scopes",
]  # fmt: skip

SCOPE = "_celery_alchemy"
"""Attribute of a thread, a greenlet or an asyncio task: its Scope, where it has one."""
_THREADS = "_celery_alchemy_thread"
"""The same of a thread that runs an event loop: there it is not to be taken for that of a coroutine."""


class Scope:
    """What belongs to one thread or greenlet, for all `Alchemy` objects of the process: nesting is a matter of the
    thread, not of the database.

    It is an attribute of the thread's or greenlet's own object. That is the weakest possible hold: there is no table
    whose keys could be reused by the next greenlet (`id()`, `get_ident()`), none that grows when a greenlet dies, and
    nothing that `contextvars.copy_context()` could carry into another thread.
    """

    __slots__ = ("__weakref__", "commits", "connecting", "ends", "held", "hosts", "units")

    def __init__(self) -> None:
        self.units: list[Any] = []
        """The entries of its open units of work, the innermost last."""
        self.held: list[Any] = []
        """The pool records of the connections that it has checked out, oldest first."""
        self.connecting: Any = None
        """The unit of work whose Session has asked for a connection, and has none yet."""
        self.commits: int = 0
        """COMMITs so far of what may have written."""
        self.hosts: Any = None
        """Of a greenlet that hosts the coroutine of a task request: the `Interruption` of that."""
        self.ends: int = 0
        """Transactions so far that code has ended, and that may have been committed so."""


#: Those of the threads and greenlets that are alive; weakly, for a greenlet that dies takes its own along.
scopes: set[weakref.ref[Scope]] = set()


def here() -> Scope:
    """Return the Scope of the current thread or greenlet; made where there is none."""
    owner: Any = current_scope()
    scope: Scope | None = getattr(owner, SCOPE, None)
    if scope is None:
        scope = _on_event_loop(owner) or _scope_of(owner, SCOPE)
    return scope


def own_scope() -> Scope:
    """Return the Scope of the current coroutine; one that no greenlet hosts gets one of its own, with its asyncio
    task."""
    if runs_in_greenlet():
        return here()
    owner: Any = current_scope()
    if hasattr(owner, SCOPE):
        setattr(owner, _THREADS, getattr(owner, SCOPE))
        delattr(owner, SCOPE)
    return _scope_of(current_coroutine(), SCOPE)


def begin_hosting(greenlet: Any, interruption: Any) -> None:
    """Give `greenlet`, which has just been made to host the coroutine of a task request, its Scope: it need not be
    looked for then."""
    scope = Scope()
    scope.hosts = interruption
    setattr(greenlet, SCOPE, scope)
    scopes.add(weakref.ref(scope, scopes.discard))


def _scope_of(owner: Any, name: str) -> Scope:
    scope: Scope | None = getattr(owner, name, None)
    if scope is None:
        scope = Scope()
        setattr(owner, name, scope)
        scopes.add(weakref.ref(scope, scopes.discard))
    return scope


def _on_event_loop(owner: Any) -> Scope | None:
    """Return the Scope of the coroutine that runs in `owner`, a greenlet that has none itself; None where there is no
    event loop, or a greenlet hosts nothing yet.

    An AsyncSession makes a greenlet for each call. It belongs to the greenlet that hosts the coroutine, or else to the
    asyncio task. Never to the thread, which runs all of them.
    """
    task = current_coroutine()
    if task is None:
        scope = getattr(owner, _THREADS, None)
        if scope is not None:  # the event loop has ended
            setattr(owner, SCOPE, scope)
        return scope
    scope = getattr(task, SCOPE, None)
    if not runs_in_greenlet():
        return scope or _scope_of(owner, _THREADS)
    host = owner.parent
    while may_await(host):
        if hasattr(host, SCOPE):
            scope = getattr(host, SCOPE)
            break
        host = host.parent
    if scope is not None:
        setattr(owner, SCOPE, scope)
    return scope


def runs_in_greenlet() -> bool:
    """Tell whether a coroutine can be awaited here: an AsyncSession or AsyncConnection has called, at some depth; or
    the greenlet hosts a coroutine.

    Without it, a callback could not tell an event loop's thread from another.
    """
    return "sqlalchemy.ext.asyncio" in sys.modules and concurrency.in_greenlet()


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
    for name in (SCOPE, _THREADS):
        with contextlib.suppress(AttributeError):
            delattr(current_scope(), name)
