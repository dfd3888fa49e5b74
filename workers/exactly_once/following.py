"""What comes after a task with `exactly_once`, in the transaction of its work: with `alchemy_outbox`.

The walk of one delivery:

ids        The rest of a chain, the members of a group or chord and a chord's body have theirs from whoever has sent
           the canvas: Celery freezes them at the call. Links and errbacks get theirs before the body runs, made of the
           task's own (`ids`); so does what the body sends (`sends`).
body       `delay()` in it waits for the COMMIT, as `delay_on_commit` does.
next       The body has returned, or called `replace()`: what Celery's tracer would send next is called here, and
           captured.
COMMIT     The row of the task, and a row of the outbox for each message.
sending    By this process, or by a sender. From now on the request has neither links nor a chain.
tracer     Has nothing left to send. It stores the result, and counts the part of a chord; the body of the chord that it
           sends then is put into the outbox first, in a transaction of its own.
copy       Finds the row, and sends nothing: the outbox keeps each message until its receiver has completed (`kept`).
failure    Records nothing. The tracer sends errbacks, by way of the outbox, with ids made of the task's own.

Left to the tracer, after the COMMIT and with the same ids, is what follows a task whose class has a `__call__` of its
own, for that may change the result, and one whose unit of work commits nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from celery import group
from celery.canvas import maybe_signature
from celery.exceptions import Ignore

from ...strategies.features.completed import REPLACED, SENT, Record
from ...strategies.features.exactly_once import Attempt
from ..apps import Served, find
from ..request import is_called
from ..sending import outbox
from ..sending.celerys_own import sent_by_celery
from ..sending.enqueue import register, session_with_outbox


def store_next(task: Any, request: Any, result: Any) -> bool:
    """Put what comes after `request`, which has returned `result`, into the transaction that commits its work; tell
    whether the tracer has nothing left to send.

    Raises:
        kombu.exceptions.EncodeError: a message cannot hold `result`.
    """
    if not (request.callbacks or request.chain) or is_called(request):
        return False
    return _with_commit(task, lambda: _send_next(task, request, result))


def drop_next(request: Any) -> None:
    """Leave the tracer nothing to send after `request`: the outbox has it."""
    request.callbacks = request.chain = None


def store_replacement(task: Any, attempt: Attempt, signature: Any, on_replace: Callable[[Any], Any]) -> Ignore | None:
    """Put what `task` is replaced by into the transaction that commits its work.

    Args:
        on_replace: Celery's own, or the user's.
    Returns:
        What ends the request after the COMMIT; None: it is left to be sent then.
    """
    ended: list[Ignore] = []

    def send() -> None:
        with sent_by_celery():
            try:
                on_replace(signature)
            except Ignore as error:
                ended.append(error)

    if not _with_commit(task, send) or not ended:
        return None
    attempt.record = Record(REPLACED, note=SENT)
    return ended[0]


def _with_commit(task: Any, send: Callable[[], None]) -> bool:
    """Let what `send` sends wait for the COMMIT of the unit of work that runs; tell whether it does."""
    db = outbox_of(task)
    if db is None or not db.units.is_open() or not db.units.current().commits:
        return False
    session = session_with_outbox(db)
    if session is None:
        return False
    with outbox.collected() as found:
        send()
    for message in found:
        register(db, message)
    if found:
        outbox.watch(db, session)
    return True


def outbox_of(task: Any) -> Served | None:
    """Return the Alchemy of the app of `task`, where that has an outbox."""
    db = find(task.app)
    return db if db is not None and db.settings.outbox else None


def _send_next(task: Any, request: Any, result: Any) -> None:
    """Send what Celery's tracer would send, as it does."""
    app = task.app
    options = {
        "parent_id": request.id,
        "root_id": request.root_id or request.id,
        "priority": (request.delivery_info or {}).get("priority") if app.conf.task_inherit_parent_priority else None,
    }
    # Copies: to send a signature changes it, and the body may run again.
    links = [maybe_signature(one, app=app) for one in copy.deepcopy(request.callbacks or [])]
    if len(links) > 1:
        for one in links:
            if isinstance(one, group):
                one.apply_async((result,), **options)
        others = [one for one in links if not isinstance(one, group)]
        links = [group(others, app=app)] if others else []
    for one in links:
        one.apply_async((result,), **options)
    if request.chain:
        *rest, following = copy.deepcopy(request.chain)
        maybe_signature(following, app=app).apply_async((result,), chain=rest, **options)
