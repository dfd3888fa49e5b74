"""A task with `exactly_once` that commits before its end, and then does not return: its row says how it has ended.

Its work is not done again. So a copy ends as it has: at once, without waiting for a result that never comes.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from celery.exceptions import Ignore, TaskPredicate
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.utils.encoding import safe_repr

from ...strategies.errors import ResultLost
from ...strategies.features.completed import Record
from . import endings
from .early import needs_no_result
from .encoding import decode, note_of

logger: logging.Logger = logging.getLogger(__name__)

_ENDED = "ended"
_LONGEST = 1000
"""Characters of an error that are kept."""


def ended_by(error: BaseException) -> Record:
    """Return the Record of a task that has committed, and has ended with `error`."""
    said = "" if isinstance(error, TaskPredicate) else safe_repr(error)[:_LONGEST]
    return Record(note=json.dumps({_ENDED: said}))


def refuse_ended(task: Any, request: Any, record: Record) -> None:
    """Let a copy end as the task that is recorded has ended, where that has not returned.

    Raises:
        Ignore: it was to have no result (Ignore, Reject).
        ResultLost: it has failed.
    """
    said = note_of(record).get(_ENDED)
    if said is None:
        return
    if not said:
        endings.ended(task, request)
        raise Ignore("It has committed, and ended with Ignore or Reject")
    raise ResultLost(
        f"{task.name}[{request.id}] has exactly_once, and has called self.db.commit() before its end: what it has "
        f"committed is done, and is not done again. After that it has failed ({said}). Leave self.db.commit() out, and "
        f"nothing is committed of a task that fails."
    )


def returned(task: Any, request: Any, record: Record) -> Any:
    """Return what the task that is recorded has returned; None where that cannot be read, and goes nowhere.

    Raises:
        ResultLost: it cannot be read, and is wanted.
    """
    try:
        return decode(task.app, record)
    except (ContentDisallowed, DecodeError, ValueError) as error:
        if needs_no_result(task, request):
            logger.warning("%s[%s]: what it has returned cannot be read: %s", task.name, request.id, error)
            return None
        raise ResultLost(
            f"{task.name}[{request.id}] has exactly_once, and has completed: its work is done, and is not done again. "
            f"But what it has returned cannot be read: {error}. It is recorded as {record.content_type!r}: add its "
            f"serializer to result_accept_content, as long as there are such rows."
        ) from error
