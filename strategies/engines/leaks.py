"""Connections that the code of a task has checked out and kept: where it did so, and how to take them back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import CodeType, FrameType

from sqlalchemy.pool import ConnectionPoolEntry

from .._sqlalchemy import fairy_of

#: The code and the line of a checkout, for a message; None: not known.
Origin = tuple[CodeType, int] | None

_LIBRARIES = (
    *("sqlalchemy.", "opentelemetry.", "wrapt.", "celery_alchemy.strategies.", "celery_alchemy.workers."),
    "contextlib",  # closing(), ExitStack, and what `with engine.begin()` enters
)
#: By the id of their variables, for speed: a checkout passes through some twenty frames. They are never unloaded.
_library_modules: set[int] = set()


def find_origin(also: tuple[str, ...] = ()) -> Origin:
    """Return the innermost line of code that belongs to no library, without keeping its variables alive.

    It is shown in a message; nothing is decided by it.

    Args:
        also: Beginnings of the names of modules that are a library's too.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals
        if id(module) not in _library_modules:
            name = module.get("__name__", "")
            if name.startswith(_LIBRARIES):
                _library_modules.add(id(module))
            elif not (also and name.startswith(also)):
                return frame.f_code, frame.f_lineno
        frame = frame.f_back
    return None


def describe(origin: Origin) -> str:
    """Name the line of code: `file:line in function`."""
    if origin is None:
        return "an unknown place"
    code, line = origin
    return f"{code.co_filename}:{line} in {code.co_name}"


def take_back(records: Sequence[ConnectionPoolEntry]) -> int:
    """Give connections back to their connection pools; they are closed, for their state is not known.

    Returns:
        How many were still checked out.
    """
    count = 0
    for record in records:
        fairy = fairy_of(record)
        if fairy is not None and fairy.is_valid:
            count += 1
            fairy.invalidate()
    return count
