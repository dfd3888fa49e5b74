"""What the current thread or greenlet has checked out of connection pools, and where it did so."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import CodeType, FrameType

from sqlalchemy.pool import ConnectionPoolEntry

from ..scope import ScopeStack

#: One stack for all connection pools of the process, oldest first.
checkouts: ScopeStack[ConnectionPoolEntry] = ScopeStack(lasting=True)

_PLACE = "celery_alchemy_place"
_LIBRARIES = ("sqlalchemy.", "celery_alchemy.strategies.", "celery_alchemy.workers.")
#: By the id of their variables, for speed: a checkout passes through some twenty frames. They are never unloaded.
_library_modules: set[int] = set()
#: The frames from here to the connection pool's own `connect`, which need not be looked at.
_OURS_AND_THE_POOLS = 6


def note(record: ConnectionPoolEntry, *, with_place: bool) -> None:
    """Put `record` on the stack, with the line of code that caused the checkout, which takes 2 to 3 us to find."""
    checkouts.push(record)
    record.__dict__[_PLACE] = _caller() if with_place else None
    # The checkin may come from another thread, or from the garbage collector: remember whose stack it is on.
    record.__dict__["holder"] = checkouts.get()


def forget(record: ConnectionPoolEntry) -> None:
    """Take `record` off the stack it is on."""
    holder = record.__dict__.pop("holder", None)
    if holder is not None and record in holder:
        holder.remove(record)


def is_noted(record: ConnectionPoolEntry) -> bool:
    """Tell whether `record` is on a stack."""
    return "holder" in record.__dict__


def take_back(records: Sequence[ConnectionPoolEntry]) -> list[str]:
    """Give connections back to their connection pools; they are closed, for nobody knows their state.

    Returns:
        For each that was still out, the place where it was checked out: `file:line in function`.
    """
    places = []
    for record in records:
        reference = getattr(record, "fairy_ref", None)
        fairy = reference() if reference is not None else None
        if fairy is not None and fairy.is_valid:
            places.append(place_of(record))
            fairy.invalidate()
    return places


def place_of(record: ConnectionPoolEntry) -> str:
    """Name the line of code that checked `record` out."""
    found: tuple[CodeType, int] | None = record.__dict__.get(_PLACE)
    if found is None:
        return "an unknown place"
    code, line = found
    return f"{code.co_filename}:{line} in {code.co_name}"


def _caller() -> tuple[CodeType, int] | None:
    """Return the innermost frame that belongs to no library, without keeping it or its variables alive."""
    frame: FrameType | None = sys._getframe(_OURS_AND_THE_POOLS)
    while frame is not None:
        module = frame.f_globals
        if id(module) not in _library_modules:
            if not module.get("__name__", "").startswith(_LIBRARIES):
                return frame.f_code, frame.f_lineno
            _library_modules.add(id(module))
        frame = frame.f_back
    return None
