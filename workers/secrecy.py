"""Keep passwords out of `celery report` and `celery inspect conf`.

Celery masks a setting by its name, and looks into dicts, but not at what their values hide: a URL inside
`alchemy_engine_options`, a DSN, a `creator` whose partial has the password among its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from celery.app import utils

PREFIX = "alchemy_"
"""Of all our settings."""
MASK = "*" * 8
_SECRET_NAME = re.compile(r"api|token|key|secret|pass|pwd|dsn|conninfo|credential", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"://[^/\s]*@|pass(?:word|wd)?\s*=|pwd\s*=", re.IGNORECASE)


def mask_reports() -> None:
    """Mask our settings in whatever Celery prints of a configuration; once per process."""
    celerys = utils.filter_hidden_settings
    if not hasattr(celerys, "_celery_alchemy"):
        utils.filter_hidden_settings = _masking(celerys)


def _masking(celerys: Callable[[Mapping[Any, Any]], dict[Any, Any]]) -> Callable[[Mapping[Any, Any]], dict[Any, Any]]:
    # Celery offers no hook for it; `Settings.table` looks this function up by its name for every report.
    def filter_hidden_settings(conf: Mapping[Any, Any]) -> dict[Any, Any]:
        return celerys({name: masked(value) if _is_ours(name) else value for name, value in conf.items()})

    filter_hidden_settings._celery_alchemy = True  # type: ignore[attr-defined]
    return filter_hidden_settings


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and PREFIX in name.lower()


def masked(value: Any) -> Any:
    """Return `value` without anything that could be a password; what is neither text nor number becomes its type."""
    if isinstance(value, Mapping):
        return {
            name: MASK if isinstance(name, str) and _SECRET_NAME.search(name) else masked(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [masked(inner) for inner in value]
    if isinstance(value, str):
        return MASK if _SECRET_TEXT.search(value) else value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return f"<{type(value).__name__}>"
