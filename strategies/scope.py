"""Who is running: the current thread or greenlet, and a stack of things that belong to it alone."""

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import Any, Generic, TypeVar, cast

try:
    # A thread that runs no greenlets has a main greenlet of its own, so this one call tells threads and greenlets
    # apart, monkey patched or not. Celery and SQLAlchemy 2.0 look at it the same way.
    from greenlet import getcurrent as current_scope
except ImportError:  # no greenlet installed: nothing here can run one
    from threading import current_thread as current_scope

__all__ = ["ScopeStack", "current_scope", "describe_current_scope"]

T = TypeVar("T")

_serial = itertools.count()


def describe_current_scope() -> str:
    """Name the current thread or greenlet for a message."""
    return f"{threading.current_thread().name!r} ({type(current_scope()).__name__} {id(current_scope()):#x})"


class ScopeStack(Generic[T]):
    """A stack per thread or greenlet: what one pushes no other sees, and it dies with its owner.

    The stack is an attribute of the thread's or greenlet's own object. That is the weakest possible hold: there is no
    table whose keys could be reused by the next greenlet (`id()`, `get_ident()`), none that grows when a greenlet dies
    without popping, and nothing that `contextvars.copy_context()` could carry into another thread.
    """

    __slots__ = ("_attribute", "_lasting")

    def __init__(self, *, lasting: bool = False) -> None:
        """Make a stack; a `lasting` one leaves its empty list on the thread or greenlet for the next push."""
        self._lasting = lasting
        self._attribute = f"_celery_alchemy_{next(_serial)}"

    def get(self) -> list[T] | None:
        """Return the current thread's or greenlet's stack, the innermost last; None or empty when there is none."""
        return getattr(current_scope(), self._attribute, None)

    def top(self) -> T | None:
        stack = getattr(current_scope(), self._attribute, None)
        return stack[-1] if stack else None

    def push(self, item: T) -> list[T]:
        """Put `item` on the current stack, and return that stack."""
        scope: Any = current_scope()
        stack = getattr(scope, self._attribute, None)
        if stack is None:
            stack = []
            setattr(scope, self._attribute, stack)
        stack.append(item)
        return cast("list[T]", stack)

    def remove(self, item: T, home: list[T] | None = None) -> None:
        """Take `item` out, wherever it stands in the current stack; nothing happens when it is not there.

        Args:
            home: The stack it was put on: another one, when a block is left in another thread than it was entered in
                (web frameworks run the two halves of a dependency so).
        """
        stack = getattr(current_scope(), self._attribute, None)
        if home is not None and home is not stack:
            with contextlib.suppress(ValueError):
                home.remove(item)
            return
        if not stack:
            return
        if stack[-1] is item:
            stack.pop()
            if not stack and not self._lasting:
                delattr(current_scope(), self._attribute)
            return
        for index, found in enumerate(stack):
            if found is item:
                del stack[index]
                return

    def forget(self) -> None:
        """Drop the current stack without looking at what is on it: for the child of a fork."""
        scope: Any = current_scope()
        if getattr(scope, self._attribute, None) is not None:
            delattr(scope, self._attribute)
