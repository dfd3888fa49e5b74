"""Session strategies, Engines, fork and green safety, connection-pool sizing. Never imports Celery."""

from .base import SessionStrategy
from .errors import (
    BrokenTransaction,
    CeleryAlchemyError,
    InvalidSetting,
    NoUnitOfWork,
    ReservedSlotsInUse,
    TransientDatabaseError,
)
from .local import LocalStrategy
from .outbox import outbox_table
from .per_process import PerProcessStrategy
from .scoped import ScopedStrategy
from .transient import is_transient
from .worker_pool import WorkerPool

__all__ = [
    "BrokenTransaction",
    "CeleryAlchemyError",
    "InvalidSetting",
    "LocalStrategy",
    "NoUnitOfWork",
    "PerProcessStrategy",
    "ReservedSlotsInUse",
    "ScopedStrategy",
    "SessionStrategy",
    "TransientDatabaseError",
    "WorkerPool",
    "is_transient",
    "outbox_table",
]
