"""Session strategies, Engines, fork and green safety, connection-pool sizing. Never imports Celery."""

from .base import SessionStrategy
from .engines.transient import is_transient
from .errors import (
    BrokenTransaction,
    CeleryAlchemyError,
    InvalidSetting,
    NoUnitOfWork,
    ReservedSlotsInUse,
    TransientDatabaseError,
)
from .features.outbox import outbox_table
from .local import LocalStrategy
from .per_process import PerProcessStrategy
from .scoped import ScopedStrategy
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
