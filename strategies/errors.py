"""What this library raises of its own; each message says what happened, where, and the remedy."""

from __future__ import annotations

from sqlalchemy import exc as sa_exc


class CeleryAlchemyError(Exception):
    """Base of every error that this library raises of its own."""


class InvalidSetting(CeleryAlchemyError, ValueError):
    """A setting that no strategy or Engine can work with. Users catch `ConfigurationError`, its Celery-side child."""


class NoUnitOfWork(CeleryAlchemyError, RuntimeError):
    """There is no unit of work in this thread or greenlet, so there is no Session to return."""


class BrokenTransaction(CeleryAlchemyError, sa_exc.PendingRollbackError):
    """A unit of work was to be committed after a database error that nobody rolled back; the error is its cause."""


class ReservedSlotsInUse(CeleryAlchemyError, sa_exc.TimeoutError):
    """A nested unit of work found no free connection; waiting for one would be waiting for itself."""
