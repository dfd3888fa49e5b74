"""SQLAlchemy sessions for Celery tasks, right under every worker pool."""

from .strategies import (
    BrokenTransaction,
    CeleryAlchemyError,
    LocalStrategy,
    NoUnitOfWork,
    PerProcessStrategy,
    ReservedSlotsInUse,
    ScopedStrategy,
    SessionStrategy,
    TransientDatabaseError,
    WorkerPool,
    is_transient,
    outbox_table,
)
from .workers import Alchemy, ConfigurationError, CurrentSession, DatabaseTask, UseDatabase

__all__ = [
    "Alchemy",
    "BrokenTransaction",
    "CeleryAlchemyError",
    "ConfigurationError",
    "CurrentSession",
    "DatabaseTask",
    "LocalStrategy",
    "NoUnitOfWork",
    "PerProcessStrategy",
    "ReservedSlotsInUse",
    "ScopedStrategy",
    "SessionStrategy",
    "TransientDatabaseError",
    "UseDatabase",
    "WorkerPool",
    "is_transient",
    "outbox_table",
]
