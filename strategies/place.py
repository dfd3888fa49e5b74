"""Whose a block is that is open in this thread: other code may run here before it is ended.

A web framework's thread pool runs the two halves of a dependency, and the code between them, in whatever threads are
free: after the first half its thread serves other requests, and the block is still open on it.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar


class Place:
    """Where a block was opened outside an event loop: code that runs in that context, or in a copy of it, is inside."""

    __slots__ = ("_outer", "ended")
    ended: bool

    def __init__(self, outer: Place | None) -> None:
        self._outer, self.ended = outer, False

    @property
    def outer(self) -> Place | None:
        """The one around it that has not ended."""
        found = self._outer
        while found is not None and found.ended:
            found = found._outer
        return found


_place: ContextVar[Place | None] = ContextVar("celery_alchemy_place", default=None)


def enter() -> object:
    """Return what names the code that opens a block here: an asyncio task, or a `Place`."""
    coroutine = current_coroutine()
    if coroutine is not None:
        return coroutine
    around = _place.get()
    place = Place(around.outer if around is not None and around.ended else around)
    _place.set(place)
    return place


def leave_place(place: object) -> None:
    """The block of `place` has ended."""
    if isinstance(place, Place):
        place.ended = True
        if _place.get() is place:
            _place.set(place.outer)


def come_back(place: object) -> None:
    """The block of `place` is about to be ended here, maybe in another context than it was opened in."""
    if isinstance(place, Place) and not is_here(place):
        _place.set(place)


def is_here(place: object) -> bool:
    """Tell whether the code that runs here is inside the block of `place`; None: that of a task, which has its thread
    or greenlet for itself."""
    if place is None:
        return True
    if not isinstance(place, Place):
        return place is current_coroutine()
    seen = _place.get()
    while seen is not None and seen is not place:
        seen = seen.outer
    return seen is place


def is_strange(place: object) -> bool:
    """Tell whether the block of `place` is another request's, which has left it open in this thread."""
    return isinstance(place, Place) and not is_here(place)


def current_coroutine() -> object:
    """Return the running asyncio task; None where there is no event loop."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return None
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None
