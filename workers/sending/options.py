"""What a call of `apply_async_on_commit` was given beside the Session: refused where it cannot be meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Mapping
from typing import Any

from celery import Celery, Task
from kombu import Producer

from ...strategies.errors import CeleryAlchemyError
from .arguments import is_session

_OURS = ("session", "raises", "enqueue_on_commit")
_ALIKE = 0.75
"""How much of an option's name must be that of a known one: Celery hands others on to the broker, as properties."""


def check_call(name: str, args: Any, kwargs: Any, options: Mapping[str, Any]) -> None:
    """Refuse what would fail, or do nothing, only after the COMMIT.

    Args:
        name: Of what is sent.
    Raises:
        TypeError: the arguments of the task are no tuple or list, or no dict; as Celery's `apply_async` does.
        CeleryAlchemyError: an option is a Session, or is written nearly like one that there is.
    """
    if args is not None and not isinstance(args, tuple | list):
        raise TypeError(
            f"{name}: the arguments of the task are {args!r:.60}, but they must be a tuple or a list: "
            f"apply_async_on_commit((1,), session=session)."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"{name}: the keyword arguments of the task are {kwargs!r:.60}, but they must be a dict. All arguments "
            f"stand in one tuple: apply_async_on_commit((1, 2))."
        )
    for option, value in options.items():
        if option in _known():
            continue
        near = difflib.get_close_matches(option, _known(), n=1, cutoff=_ALIKE)
        if near or is_session(value):
            meant = near[0] if near else "session"
            raise CeleryAlchemyError(
                f"apply_async_on_commit() of {name} has no option {option!r}. Did you mean {meant!r}?"
            )


@functools.cache
def _known() -> frozenset[str]:
    """Return the options of Celery's `apply_async` and `send_task`, of kombu's `publish`, and ours."""
    functions = (Task.apply_async, Celery.send_task, Producer.publish)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(names) | {"queue", "time_limit", "soft_time_limit", "ignore_result", *_OURS}
