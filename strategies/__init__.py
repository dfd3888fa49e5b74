"""Session strategies, Engines, fork and green safety, connection-pool sizing. Never imports Celery."""

from .base import SessionStrategy
from .engines.transient import is_transient
from .errors import (
    BrokenTransaction,
    CeleryAlchemyError,
    InvalidSetting,
    NoConnectionFree,
    NotSentYet,
    NoUnitOfWork,
    ReservedSlotsInUse,
    TransientDatabaseError,
)
from .features.completed_table import completed_tasks_table
from .features.exactly_once import CommittedEarly
from .features.outbox import outbox_table
from .features.read_only import ReadOnlyError
from .local import LocalStrategy
from .per_process import PerProcessStrategy
from .scoped import ScopedStrategy
from .several.two_phase import TwoPhaseUnavailable
from .worker_pool import WorkerPool

__all__ = [
    "BrokenTransaction",
    "CeleryAlchemyError",
    "CommittedEarly",
    "InvalidSetting",
    "LocalStrategy",
    "NoConnectionFree",
    "NoUnitOfWork",
    "NotSentYet",
    "PerProcessStrategy",
    "ReadOnlyError",
    "ReservedSlotsInUse",
    "ScopedStrategy",
    "SessionStrategy",
    "TransientDatabaseError",
    "TwoPhaseUnavailable",
    "WorkerPool",
    "completed_tasks_table",
    "is_transient",
    "outbox_table",
]
