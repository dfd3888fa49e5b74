"""The Celery side: extension, task class, worker-pool detection, lifecycle. The only folder that imports Celery."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .async_task import AsyncDatabaseTask, CurrentAsyncSession
    from .errors import ConfigurationError
    from .extension import Alchemy
    from .injection import CurrentSession, UseDatabase
    from .sending.late import late
    from .task import DatabaseTask

__all__ = [
    "Alchemy",
    "AsyncDatabaseTask",
    "ConfigurationError",
    "CurrentAsyncSession",
    "CurrentSession",
    "DatabaseTask",
    "UseDatabase",
    "late",
]

_HOMES = {
    "Alchemy": "extension",
    "AsyncDatabaseTask": "async_task",
    "ConfigurationError": "errors",
    "CurrentAsyncSession": "async_task",
    "CurrentSession": "injection",
    "DatabaseTask": "task",
    "UseDatabase": "injection",
    "late": "sending.late",
}


if not TYPE_CHECKING:  # a type checker is to find names that are not there

    def __getattr__(name: str) -> Any:
        # Not at import: `pytest_plugin` is imported at every start of pytest, and is not to bring Celery with it.
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        return value
