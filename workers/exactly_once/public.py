"""What an Alchemy offers to tasks with `exactly_once`, and to people."""

from __future__ import annotations

from ...strategies.errors import CeleryAlchemyError
from ...strategies.features.completed_table import recorded_id
from ...strategies.features.exactly_once import ATTEMPT
from .. import apps
from .._celery import outermost_request
from ..apps import Served
from ..errors import as_configuration_error
from ..no_unit import no_unit_here
from .ids import derived, key_of
from .rows import Rows


def idempotency_key() -> str:
    """Return a key that is the same whenever the task request that runs here is delivered, or retried.

    Raises:
        NoUnitOfWork: no task runs in this thread or greenlet.
    """
    request = outermost_request()
    if request is None or request.id is None:
        raise no_unit_here("db.idempotency_key")
    return derived(key_of(request), "idempotency")


def forget(db: Served, task_id: str) -> int:
    """Delete what is recorded of the task with this id, so that it can run again; return how many rows there were.

    Args:
        db: Of any database of the app: the rows are in the default one.
    Raises:
        CeleryAlchemyError: it is the task that runs here, whose row is not committed yet. PostgreSQL would find
            nothing, and MariaDB wait for the transaction that waits for it.
    """
    request = outermost_request()
    if request is not None and request.id == task_id and ATTEMPT in request.__dict__:
        raise CeleryAlchemyError(
            f"db.forget({task_id!r}) was called by the task with this id, which is recorded when it ends. Call it when "
            f"that has ended; or leave exactly_once out, where the task is to run again."
        )
    with as_configuration_error():
        return Rows(apps.get(db.app)).forget(recorded_id(task_id))
