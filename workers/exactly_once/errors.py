"""Errors of tasks with `exactly_once`."""

from __future__ import annotations

from ...strategies.errors import CeleryAlchemyError


class ResultLost(CeleryAlchemyError):
    """The work of a task is committed, and its result is not known: it had committed before its end, and never
    returned."""
