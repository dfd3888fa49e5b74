"""What the doctor finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, or may become so."""

    level: Level
    """error: it goes wrong; warning: it goes wrong under load or after a fault; note: good to know."""
    code: str
    """The same for the same fault, for scripts and for looking it up in the documentation."""
    what: str
    remedy: str
    where: str = ""
    """A setting, a task, or file:line."""


def error(code: str, what: str, remedy: str, where: str = "") -> Finding:
    return Finding("error", code, what, remedy, where)


def warning(code: str, what: str, remedy: str, where: str = "") -> Finding:
    return Finding("warning", code, what, remedy, where)


def note(code: str, what: str, remedy: str, where: str = "") -> Finding:
    return Finding("note", code, what, remedy, where)
