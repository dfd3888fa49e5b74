"""What the Sessions of one database are made of."""

from __future__ import annotations

from typing import Any

from ..strategies.deferring_sessions import DeferringSession
from ..strategies.options import DatabaseOptions
from ..strategies.sessions import UnitSession
from ..strategies.several.two_phase import TwoPhaseSession
from .settings import Settings


def session_options(
    settings: Settings, options: DatabaseOptions, *, deferring: bool
) -> tuple[dict[str, Any], tuple[type[UnitSession], ...]]:
    """Return the keyword arguments of Sessions, and what kinds of Session they are."""
    kinds: list[type[UnitSession]] = []
    if options.two_phase:
        kinds.append(TwoPhaseSession)
    if deferring:
        kinds.append(DeferringSession)
    given = {**settings.session_options, "twophase": True} if options.two_phase else settings.session_options
    return given, tuple(kinds) or (UnitSession,)
