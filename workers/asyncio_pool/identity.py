"""Who is running, for `current_task` and `self.request`: the task request, in its child coroutines and threads too."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ...strategies.scope import current_scope


class Identity:
    """Of one task request. Contexts are copied into child coroutines and into `asyncio.to_thread`, and so is this."""

    __slots__ = ("__weakref__", "label")

    def __init__(self, label: str) -> None:
        self.label: str = label
        """The task's name and the request's id, for a message."""


_identity: ContextVar[Identity | None] = ContextVar("celery_alchemy_identity", default=None)


become: Callable[[Identity], object] = _identity.set
"""Let what runs in this context from now on be part of one request."""


def who() -> Any:
    """Return what Celery is to find the current request by."""
    return _identity.get() or current_scope()


def identity_in(context: Any) -> Identity | None:
    """Return the request that a context belongs to; None: to none."""
    found: Identity | None = context.get(_identity)
    return found
