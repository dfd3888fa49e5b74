"""Who is running: the current thread or greenlet, and a stack of things that belong to it alone."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Generic, TypeVar, cast

try:
    # A thread that runs no greenlets has a main greenlet of its own, so this one call tells threads and greenlets
    # apart, monkey patched or not. Celery and SQLAlchemy 2.0 look at it the same way.
    from greenlet import getcurrent as current_scope
except ImportError:  # no greenlet installed: nothing here can run one
    from threading import current_thread as current_scope

__all__ = ["CONNECTING", "HELD", "UNITS", "ScopeStack", "current_scope", "describe_current_scope"]

T = TypeVar("T")

UNITS = "_celery_alchemy_units"
"""Attribute of a thread or greenlet: the entries of its open units of work, the innermost last."""
HELD = "_celery_alchemy_held"
"""Attribute of a thread or greenlet: the pool records of the connections that it has checked out, oldest first."""
CONNECTING = "_celery_alchemy_connecting"
"""Attribute of a thread or greenlet: the unit of work whose Session has asked for a connection, and has none yet."""


def describe_current_scope() -> str:
    """Name the current thread or greenlet for a message."""
    return f"{threading.current_thread().name!r} ({type(current_scope()).__name__} {id(current_scope()):#x})"


class ScopeStack(Generic[T]):
    """A stack per thread or greenlet: what one pushes no other sees, and it dies with its owner.

    The stack is an attribute of the thread's or greenlet's own object. That is the weakest possible hold: there is no
    table whose keys could be reused by the next greenlet (`id()`, `get_ident()`), none that grows when a greenlet dies
    without popping, and nothing that `contextvars.copy_context()` could carry into another thread.

    The empty list stays on the thread or greenlet for the next push. On the path of a request this list is read and
    changed in place, by the attribute's name.
    """

    __slots__ = ("_attribute",)

    def __init__(self, attribute: str) -> None:
        self._attribute = attribute

    def get(self) -> list[T]:
        """Return the current thread's or greenlet's stack, the innermost last; made where there is none."""
        scope: Any = current_scope()
        stack = getattr(scope, self._attribute, None)
        if stack is None:
            stack = []
            setattr(scope, self._attribute, stack)
        return cast("list[T]", stack)

    def top(self) -> T | None:
        """Return what was pushed last; None where the stack is empty."""
        stack = getattr(current_scope(), self._attribute, None)
        return stack[-1] if stack else None

    def forget(self) -> None:
        """Drop the current stack without looking at what is on it: for the child of a fork."""
        scope: Any = current_scope()
        with contextlib.suppress(AttributeError):
            delattr(scope, self._attribute)
