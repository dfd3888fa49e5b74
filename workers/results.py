"""What a task returns, looked at before its COMMIT: a result that cannot be encoded would fail it after."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import logging
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from celery.backends.base import DisabledBackend
from celery.utils.saferepr import saferepr
from kombu import serialization
from kombu.exceptions import EncodeError
from sqlalchemy import inspect

from ._celery import is_result_ignored, pickles_results
from .errors import UnencodableResult

logger: logging.Logger = logging.getLogger(__name__)

#: Types that every serializer takes. So are texts in ASCII: msgpack takes no half of a surrogate pair.
FLAT = frozenset({type(None), bool, float})
#: Types that JSON takes in any of their lists and dicts.
_PLAIN = FLAT | {str}
#: Whole numbers below it too: msgpack takes 64 bits, and Python writes 4,300 digits.
LARGE = 2**63
#: Types of the standard library that are encoded the second time as they were the first.
_STEADY = frozenset({datetime.datetime, datetime.date, datetime.time, decimal.Decimal, uuid.UUID})
_FAILURES = (EncodeError, TypeError, ValueError, RecursionError)
_DEEPEST = 50


def checked(entry: Any, task: Any, result: Any) -> Any:
    """Return what is the result of `task` where `entry`, which has just returned `result`, ends.

    What an own `__call__` of the task makes of the result of `run` is seen when it returns. Where the latter cannot be
    encoded, the COMMIT waits until then. Where `run` has committed, and its `__call__` then returns what cannot be
    encoded, the task has not failed.

    Raises:
        UnencodableResult: it cannot be encoded, and nothing is committed.
    """
    request = entry.request
    if entry.kind not in {"run", "call"} or request is None or request.called_directly:
        return result
    if not entry.owns and not entry.ends:
        return result  # called like a function
    try:
        refuse_unencodable(task, request, result)
    except UnencodableResult as error:
        if not entry.owns:
            entry.ends = False
        elif entry.kind == "run" or entry.outcome != "committed" or request.chain or request.callbacks:
            raise
        else:
            logger.error("%s had committed before its own __call__ returned; None is stored. %s", task.name, error)
            return None
    return result


def refuse_unencodable(task: Any, request: Any, result: Any) -> None:
    """Refuse the `result` of `task` where Celery could not store it, nor send it to the next task.

    Raises:
        UnencodableResult: it could not.
    """
    app, backend = task.app, task.backend
    stored = not isinstance(backend, DisabledBackend) and (request.chord or not is_result_ignored(task, request))
    stored = stored and (task.store_eager_result or not request.is_eager)
    sent = not request.is_eager and (request.chain or request.callbacks)
    serializers = ({backend.serializer} if stored else set()) | ({app.conf.task_serializer} if sent else set())
    if serializers <= {"json"} and _is_plain(result, _DEEPEST):
        return
    steady = _is_plain(result, _DEEPEST, _STEADY)
    try:
        # It is encoded again after the COMMIT, and shown in the log: a value with code of its own is asked twice here.
        for _ in range(1 if steady else 2):
            if not steady:
                saferepr(result, task.resultrepr_maxsize)
            if stored and not pickles_results(backend):
                backend.encode({"result": backend.prepare_value(result)})
            if sent:
                serialization.dumps((result,), app.conf.task_serializer)
    except _FAILURES as error:
        place, value = "", result
        with contextlib.suppress(*_FAILURES):  # it may fail again where it is gone through
            place, value = _first_odd(result)
        raise UnencodableResult(
            f"{task.name}[{request.id}] returned {_described(place, value)}, which cannot be encoded as "
            f"{' or '.join(sorted(serializers)) or 'text'} for the result backend, the next task or the log: {error}. "
            f"Nothing is committed. {_remedy(value)}"
        ) from error


def _is_plain(value: Any, depth: int, also: frozenset[type] = frozenset()) -> bool:
    kind = type(value)
    if kind in _PLAIN or kind in also:
        return True
    if kind is int:
        return bool(-LARGE < value < LARGE)
    if depth == 0:
        return False
    if kind is list or kind is tuple:
        return all(_is_plain(one, depth - 1, also) for one in value)
    if kind is not dict:
        return False
    return all(_is_plain(key, 0) and _is_plain(one, depth - 1, also) for key, one in value.items())


def _first_odd(value: Any, place: str = "", depth: int = 0) -> tuple[str, Any]:
    """Return the innermost value that is not plain, and where it stands."""
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Mapping):
        inner = ((f"[{key!r}]", one) for key, one in value.items())
    elif isinstance(value, list | tuple):
        inner = ((f"[{number}]", one) for number, one in enumerate(value))
    if depth < _DEEPEST:
        for step, one in inner:
            if not _is_plain(one, _DEEPEST):
                return _first_odd(one, place + step, depth + 1)
    return place, value


def _described(place: str, value: Any) -> str:
    kind = type(value).__name__
    article = "an" if kind[:1].upper() in "AEIOU" else "a"
    return f"{article} {kind}" + (f" at {place} of its result" if place else "")


def _remedy(value: Any) -> str:
    if inspect(value, raiseerr=False) is not None:
        return "Return its primary key, or a dict of what the caller needs: a model belongs to its Session."
    return "Return what can be encoded, or set ignore_result=True where nobody reads the result."
