"""What this library raises of its own; each message says what happened, where, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import exc as sa_exc

from .interrupts import is_interrupt


class CeleryAlchemyError(Exception):
    """Base of every error that this library raises of its own."""


class InvalidSetting(CeleryAlchemyError, ValueError):
    """A setting that no strategy or Engine can work with. Users catch `ConfigurationError`, its Celery-side child."""


class NoUnitOfWork(CeleryAlchemyError, RuntimeError):
    """There is no unit of work in this thread or greenlet, so there is no Session to return."""


class BrokenTransaction(CeleryAlchemyError, sa_exc.PendingRollbackError):
    """A transaction was to be committed that had failed before, or that was ended behind SQLAlchemy's back.

    The error that it failed with is its cause, where it is known."""

    ended: Any = None
    """What the driver knows of it."""


class SessionClosedEarly(CeleryAlchemyError):
    """Code has closed the Session of its unit of work with work in it that was not committed, and is lost."""


class TransientDatabaseError(CeleryAlchemyError):
    """A database error that passes by itself: deadlock, serialization failure, lock timeout, a lost or refused
    connection, no connection free. Made for `autoretry_for`; each attempt has a fresh transaction.

    Every such error is also an instance of the class that SQLAlchemy gives it, mostly
    `sqlalchemy.exc.OperationalError`.
    """


class NoConnectionFree(TransientDatabaseError, sa_exc.TimeoutError):
    """No connection of the connection pool became free within its `pool_timeout`."""

    code: str = "3o7r"
    """Of SQLAlchemy's page on it; here, for an error made from its message alone has no other."""


class ReservedSlotsInUse(TransientDatabaseError, sa_exc.TimeoutError):
    """A nested unit of work found no free connection; waiting for one would be waiting for itself."""


class NotSentYet(CeleryAlchemyError, RuntimeError):
    """The result was asked for of a message that waits for the COMMIT of the transaction that is open here."""


class UnseenBlock(CeleryAlchemyError):
    """A `db.follow()` block is open that the code it is for cannot see."""


class OtherDatabase(CeleryAlchemyError):
    """A message was to wait for the COMMIT of a Session that is of another database than the outbox."""


class SharedSession(CeleryAlchemyError):
    """A Session was used by another coroutine than the one it belongs to."""


class NotEnded(CeleryAlchemyError):
    """The server refuses to end a prepared transaction."""


class BodyCancelled(CeleryAlchemyError):
    """A task was cancelled by its own code, not by a time limit, nor by who revokes it."""


class ResultLost(CeleryAlchemyError):
    """The work of a task is committed, and its result is not known: it had committed before its end, and never
    returned; or what is recorded cannot be read."""


class RollBack(Exception):
    """Stands for the exception where a roll back was asked for and nothing failed."""


@contextmanager
def refused_as(kind: type[CeleryAlchemyError], what: str, given: Iterable[str]) -> Iterator[None]:
    """Raise whatever the block raises as `kind`: `what`, the reason, the names of what was `given` but no values."""
    try:
        yield
    except CeleryAlchemyError:
        raise
    except Exception as error:
        if is_interrupt(error):
            raise
        names = ", ".join(sorted(given)) or "none"
        raise kind(f"{what}: {type(error).__name__}: {error}. Given: {names} (values not shown).") from error
