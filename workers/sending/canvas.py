"""`delay_on_commit` for what is no DatabaseTask: a signature, a chain, group or chord, any task, a task by its name."""

from __future__ import annotations

import functools
from typing import Any

from celery import Signature, Task
from celery.utils import uuid

from ...strategies.names import type_of
from .. import apps
from ..errors import ConfigurationError
from . import orders
from .arguments import refuse_sessions, snapshot
from .calls import defer
from .enqueue import waits
from .late import has_late, made
from .options import check_call


def apply_async_on_commit(
    db: apps.Served, what: Any, args: Any, kwargs: Any, *, session: Any, raises: bool, options: dict[str, Any]
) -> Any:
    """Send `what` after the COMMIT; return its result, whose ids are those that its tasks will have.

    Raises:
        ConfigurationError: it is nothing that can be sent, or of an app that has no Alchemy.
    """
    signature = _signature(db, what)
    app = signature.app
    if apps.find(app) is None:
        raise ConfigurationError(
            f"{signature!r} cannot wait for a COMMIT: it is sent by the Celery app {app.main!r}, which has no Alchemy."
        )
    check_call(str(signature.task), args, kwargs, options)
    refuse_sessions(str(signature.task), args, kwargs)
    with orders.on_commit(session, raises=raises):
        if not waits(db, None, None, options):
            if has_late(args, kwargs):
                args, kwargs = made(args, kwargs)
            return signature.apply_async(args, kwargs, **options)
        if not has_late(args, kwargs) and not app.conf.task_always_eager:
            return signature.apply_async(args, kwargs, **options)  # each of its messages waits
        # What is run eagerly passes through nothing of ours, and what is late is made once for all of its messages.
        frozen = signature.clone()
        options["task_id"] = task_id = options.get("task_id") or frozen.options.get("task_id") or uuid()
        frozen.options["task_id"] = task_id
        result = frozen.freeze(task_id)
        prepare = functools.partial(snapshot, app, options=options)
        defer(db, str(frozen.task), result.id, _sender(frozen), args, kwargs, options, prepare)
        return result


def refuse_signature(callback: Any) -> None:
    """Refuse a signature as an `on_commit` callback: to call it is to run its task here, in this process.

    Raises:
        ConfigurationError: says how to send it.
    """
    if not callable(callback):
        raise ConfigurationError(
            f"db.on_commit() got {type_of(callback)}, but it needs a function, which is called after the COMMIT: "
            f"db.on_commit(lambda: task.delay(1)). task.delay(1) itself has sent already."
        )
    if isinstance(callback, Signature):
        raise ConfigurationError(
            f"db.on_commit({callback!r}) would run the task in this process. To send it after the COMMIT, write "
            f"db.delay_on_commit(...) with the signature."
        )


def _sender(frozen: Signature) -> Any:
    def send(args: Any, kwargs: Any, **options: Any) -> Any:
        return frozen.apply_async(args, kwargs, **options)

    return send


def _signature(db: apps.Served, what: Any) -> Signature:
    if isinstance(what, Signature):
        return what
    if isinstance(what, Task):
        return what.s()
    if isinstance(what, str) and db.app is not None:
        return db.app.signature(what)
    raise ConfigurationError(
        f"delay_on_commit() got {type_of(what)}, which cannot be sent. Give it a task, the name of a task, a "
        f"signature, or a chain, group or chord. A function that is to run after the COMMIT goes to db.on_commit()."
    )
