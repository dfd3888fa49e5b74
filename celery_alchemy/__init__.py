"""SQLAlchemy sessions for Celery tasks, correct under every worker pool."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .strategies import (
        BrokenTransaction,
        CeleryAlchemyError,
        LocalStrategy,
        NotSentYet,
        NoUnitOfWork,
        PerProcessStrategy,
        ReservedSlotsInUse,
        ScopedStrategy,
        SessionStrategy,
        TransientDatabaseError,
        WorkerPool,
        completed_tasks_table,
        is_transient,
        outbox_table,
    )
    from .workers import (
        Alchemy,
        AsyncDatabaseTask,
        ConfigurationError,
        CurrentAsyncSession,
        CurrentSession,
        DatabaseTask,
        UseDatabase,
        late,
    )

__all__ = [
    "Alchemy",
    "AsyncDatabaseTask",
    "BrokenTransaction",
    "CeleryAlchemyError",
    "ConfigurationError",
    "CurrentAsyncSession",
    "CurrentSession",
    "DatabaseTask",
    "LocalStrategy",
    "NoUnitOfWork",
    "NotSentYet",
    "PerProcessStrategy",
    "ReservedSlotsInUse",
    "ScopedStrategy",
    "SessionStrategy",
    "TransientDatabaseError",
    "UseDatabase",
    "WorkerPool",
    "completed_tasks_table",
    "is_transient",
    "late",
    "outbox_table",
]

_OF_WORKERS = {
    *("Alchemy", "AsyncDatabaseTask", "ConfigurationError", "CurrentAsyncSession", "CurrentSession", "DatabaseTask"),
    *("UseDatabase", "late"),
}


if not TYPE_CHECKING:  # a type checker is to find names that are not there

    def __getattr__(name: str) -> Any:
        # Imported with the first name that is asked for: pytest imports this package at every start, for its plugin.
        if name in {"strategies", "workers"}:
            return importlib.import_module(f".{name}", __name__)
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = importlib.import_module(".workers" if name in _OF_WORKERS else ".strategies", __name__)
        value = globals()[name] = getattr(home, name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "strategies", "workers"})
