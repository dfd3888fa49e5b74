"""Which coroutine wants a connection, and what holds one around it.

SQLAlchemy makes a greenlet for each call of an AsyncSession; the connection belongs to the coroutine that has called.
"""

from __future__ import annotations

import asyncio
import weakref
from contextvars import ContextVar
from typing import Any

from sqlalchemy.pool import ConnectionPoolEntry

from ..scope import SCOPE, Scope, current_scope, scopes

AROUND = "_celery_alchemy_around"
"""Attribute of an asyncio task: the Scopes of those that have started it."""
#: The Scopes of the coroutines that have started this one, directly or not, and may wait for it.
_around: ContextVar[tuple[weakref.ref[Scope], ...]] = ContextVar("celery_alchemy_callers", default=())


def scope_of_caller() -> Scope:
    """Return the Scope of the coroutine that runs: that of the greenlet which hosts it, or of its asyncio task."""
    task: Any = asyncio.current_task()
    scope: Scope | None = None
    owner: Any = current_scope()
    while owner.parent is not None and scope is None:  # the last one runs the event loop
        scope = getattr(owner, SCOPE, None)
        owner = owner.parent
    scope = scope or getattr(task, SCOPE, None)
    if scope is None:
        scope = Scope()
        setattr(task, SCOPE, scope)
        scopes.add(weakref.ref(scope, scopes.discard))
    if not hasattr(task, AROUND):
        around = tuple(one for one in _around.get() if (found := one()) is not None and found is not scope)
        setattr(task, AROUND, around)
        _around.set((*around, weakref.ref(scope)))
    return scope


def held_around(scope: Scope) -> list[ConnectionPoolEntry]:
    """Return what `scope`, the caller's, holds, and what those hold that have started it."""
    outer = [found for one in getattr(asyncio.current_task(), AROUND, ()) if (found := one()) is not None]
    return [record for one in (scope, *outer) for record in one.held]
