"""Results of messages that have not been sent yet: to wait for one before the COMMIT would be to wait for oneself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from celery import Celery
from celery.result import ResultSet

from ...strategies.errors import NotSentYet
from ...strategies.features.foreign_callbacks import waiting_here
from ...strategies.on_commit import CommitCallbacks
from ...strategies.place import is_here
from ...strategies.registry import open_entries

_CLASSES = {"AsyncResult": ("get", "wait", "collect"), "GroupResult": (), "ResultSet": ()}
_OF_SETS = ("get", "join", "join_native", "iter_native")


def attach(app: Celery) -> None:
    """Let the results of `app` say so where their messages wait for the COMMIT of the code that asks."""
    for name, methods in _CLASSES.items():
        base = getattr(app, name)
        checked = {method: _checked(getattr(base, method)) for method in methods or _OF_SETS if hasattr(base, method)}
        setattr(app, name, type(base.__name__, (base,), checked))


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_if_waiting(self)
        return method(self, *args, **kwargs)

    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call


def _refuse_if_waiting(result: Any) -> None:
    waiting = list(_waiting_here())
    if not waiting:
        return
    by_id = {getattr(message, "task_id", None): message for one in waiting for message in one.all_of_them()}
    for task_id in _needed(result):
        if task_id in by_id:
            raise NotSentYet(
                f"{by_id[task_id]!r} waits for the COMMIT of the transaction that is open here, so its result cannot "
                f"come before that. Ask for it after the COMMIT; or send at once: apply_async(..., "
                f"enqueue_on_commit=False)."
            )


def _waiting_here() -> Iterator[CommitCallbacks]:
    """Yield what waits for COMMITs of this thread, greenlet or asyncio task."""
    for entry in open_entries():
        if is_here(entry.coroutine):
            yield from (unit.waiting for unit in entry.unit.all_units if unit.waiting is not None)
    yield from waiting_here()


def _needed(result: Any) -> Iterator[str]:
    """Yield the ids of what must have run before `result` is there, as far as that is known without asking."""
    while result is not None:
        if isinstance(result, ResultSet):
            for one in result.results:
                yield from _needed(one)
        else:
            yield result.id
        result = getattr(result, "parent", None)
