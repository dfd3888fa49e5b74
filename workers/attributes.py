"""The attributes that a task may have of ours, and what looks like one and is none."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from .errors import ConfigurationError

NAMES = ("commit_on_success", "enqueue_on_commit", "exactly_once", "isolation_retries", "read_only")
#: `enqueue_on_commit` is of any task: it is about the message, not about a Session.
_OF_DATABASE_TASKS = ("commit_on_success", "exactly_once", "isolation_retries", "read_only")
_CLOSE = 0.86
"""`readonly` and `isolation_retry` are as close as that; `isolation_level` and `read_only_fields` are not."""


def refuse_misspelled(cls: type) -> None:
    """Refuse an attribute of the task class `cls` that is close to one of ours: it would have no effect.

    One that a base class without a Session of ours defines is meant, and so is a method.

    Raises:
        ConfigurationError: names the task, the attribute and the right spelling.
    """
    for name, value in vars(cls).items():
        if name in NAMES or name.startswith("_") or callable(value) or inspect.isdatadescriptor(value):
            continue
        near = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=_CLOSE)
        if near and not any(name in vars(base) for base in cls.__mro__[1:]):
            raise ConfigurationError(
                f"{name}={value!r} of {task_name(cls)!r} is no attribute of a task, and would have no effect. Did you "
                f"mean {near[0]!r}? An attribute of your own that is called so is defined in a base class that is no "
                f"DatabaseTask."
            )


def without_effect(task: Any) -> list[str]:
    """Return which attributes of ours `task`, which is no DatabaseTask, was given by its decorator or class body."""
    cls = type(task)
    own = [name for name in _OF_DATABASE_TASKS if name in vars(cls)]
    return [name for name in own if not any(name in vars(base) for base in cls.__mro__[1:])]


def task_name(cls: Any) -> str:
    """Return the name of a task class, for a message."""
    return str(cls.name or cls.__name__)
