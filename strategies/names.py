"""Names made fit for where they go: a task's id is whatever its sender has chosen."""

from __future__ import annotations

import re

_VOWEL = re.compile(r"[AEIOaeio]|[Uu](?:p|lt|n(?!i))")
_ALLOWED = re.compile(r"[A-Za-z0-9_.-]*")


def printable(name: str) -> str:
    """Return `name` for people, logs and metrics: a question mark for what has no UTF-8, or would begin a line."""
    return name if name.isprintable() else "".join(one if one.isprintable() else "?" for one in name)


def in_ascii(name: str) -> str:
    """Return `name` for a server, whatever encoding it has: a question mark for all but ASCII."""
    return printable(name).encode("ascii", "replace").decode("ascii")


def is_plain(name: str) -> bool:
    """Tell whether `name` needs no quotes anywhere: letters, digits, `_`, `.` and `-` of ASCII."""
    return _ALLOWED.fullmatch(name) is not None


def type_of(thing: object) -> str:
    """Name the type of `thing` with its article, for a message."""
    name = type(thing).__name__
    return f"{'an' if _VOWEL.match(name) else 'a'} {name}"


def counted(number: int, noun: str) -> str:
    """Return "1 task" or "2 tasks"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
