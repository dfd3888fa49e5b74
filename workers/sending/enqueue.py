"""Sending a task once the transaction that it belongs to is committed.

Everything that Celery sends goes through `app.send_task`: `delay`, `apply_async`, a canvas, a task by its name. There,
and nowhere else, a message is sent at once or registered for the COMMIT. By then Celery has checked the arguments; they
are serialised here too, so that what cannot be sent fails where it was asked for and what changes later is not seen.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from celery import Celery
from celery.result import denied_join_result
from celery.utils import uuid
from kombu import serialization
from sqlalchemy.orm import Session

from ...strategies.features.foreign_sessions import on_commit_of, plain_session
from ...strategies.registry import open_entries
from ...strategies.sessions import owner_of
from ...strategies.unit_of_work import UnitOfWork
from .. import apps
from .._celery import known_task, running_request
from ..request import is_over
from ..settings import DEFAULT
from . import outbox, recording

OPTION = "enqueue_on_commit"
"""Of one call, and as an attribute of a task: wait for the commit (True) or send at once (False)."""
_OURS = "_celery_alchemy_send_task"
_FLAT = frozenset({type(None), bool, int, float, str})
_SEQUENCES = frozenset({tuple, list, type({}.values())})


class on_commit:  # noqa: N801 - used as a function is
    """Let what the block sends wait for the COMMIT: of `session`, or of the unit of work that is running.

    Args:
        raises: As of `apply_async_on_commit`.
    """

    __slots__ = ("_token", "raises", "session")

    def __init__(self, session: Session | None, *, raises: bool) -> None:
        self.session, self.raises = session, raises

    def __enter__(self) -> None:
        self._token = _ordered.set(self)

    def __exit__(self, *exc_info: object) -> None:
        _ordered.reset(self._token)


#: Set for the duration of one call: whatever it sends waits.
_ordered: ContextVar[on_commit | None] = ContextVar("celery_alchemy_on_commit", default=None)


class sending:  # noqa: N801 - used as a function is
    """Tell `sends` that the block sends `task`: to look at `task_always_eager` costs as much as half a SELECT."""

    __slots__ = ("_task", "_token")

    def __init__(self, task: Any) -> None:
        self._task = task

    def __enter__(self) -> None:
        self._token = _sent.set(self._task)

    def __exit__(self, *exc_info: object) -> None:
        _sent.reset(self._token)


#: The task that is being sent.
_sent: ContextVar[Any] = ContextVar("celery_alchemy_sent", default=None)


def sends(task: Any) -> bool:
    """Tell whether `task` is being sent now, and does not only run."""
    return _sent.get() is task


#: Set while Celery itself sends.
_celerys_own: ContextVar[bool] = ContextVar("celery_alchemy_celerys_own", default=False)


class Sending:
    """A message that waits for a COMMIT; calling it sends."""

    __slots__ = ("_name", "_send", "_task_id")

    def __init__(self, name: str, task_id: str, send: Callable[[], object]) -> None:
        self._name, self._task_id, self._send = name, task_id, send

    def __call__(self) -> Any:
        token = _ordered.set(None)  # an eager task runs now, and what it sends is its own business
        try:
            return self._send()
        finally:
            _ordered.reset(token)

    def __repr__(self) -> str:
        return f"sending {self._name}[{self._task_id}]"


def attach(app: Celery) -> None:
    """Let the messages of `app` wait for a COMMIT where they are to."""
    original = app.send_task
    if getattr(original, _OURS, False):
        return
    places = _places(original)

    def send(name: str, args: Any, kwargs: Any, **options: Any) -> Any:
        if recording.ATTRIBUTE in app.__dict__ and recording.kept(app, name, args, kwargs, options):
            return recording.result_of(app, options.get("task_id") or uuid(), options)
        return original(name, args, kwargs, **options)

    @functools.wraps(original)
    def send_task(name: str, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        asked = options.pop(OPTION, None)
        db = _innermost(app)
        if more:
            options |= zip(places, more, strict=False)
        if db is None or not waits(
            db, asked, options.get("task_type") or known_task(app, name), options.get("parent_id")
        ):
            return send(name, args, kwargs, **options)
        task_id = options["task_id"] = options.get("task_id") or uuid()
        result = (options.get("result_cls") or app.AsyncResult)(task_id)
        result.ignored = options.get("ignore_result")
        args, kwargs = snapshot(app, args, kwargs, options)
        # Whatever it is that sends now, a group or a `with` of the caller, gives its producer back before the COMMIT.
        for producer in ("producer", "publisher"):
            options.pop(producer, None)
        if (session := _session_with_outbox(db)) is not None:
            register(db, outbox.Stored(app, name, args, kwargs, options))
            outbox.watch(db, session)
        else:
            options["result_cls"] = lambda task_id: result
            register(db, Sending(name, task_id, functools.partial(send, name, args, kwargs, **options)))
        return result

    setattr(send_task, _OURS, True)
    app.send_task = send_task


def eagerly(task: Any, apply: Callable[..., Any], args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
    """Run a task of `task_always_eager` when a message would be sent; it does not pass through `app.send_task`."""
    asked = options.pop(OPTION, None)
    task_id = options["task_id"] = options.get("task_id") or uuid()
    app = task.app
    message = Sending(task.name, task_id, functools.partial(_run_now, apply, app, task.name, args, kwargs, options))
    db = _innermost(app)
    if db is None or not waits(db, asked, task):
        return message()
    register(db, message)
    return task.AsyncResult(task_id)


def _innermost(app: Celery) -> apps.Served | None:
    """Return the Alchemy whose unit of work is the innermost one here; that of the default database where there is
    none, or one over all."""
    known: dict[str, apps.Served] = app.__dict__.get(apps.ALL, {})
    if len(known) > 1:
        for entry in reversed(open_entries()):
            for db in known.values():
                if entry.registry is db.units:
                    return db
    return getattr(app, apps.ATTRIBUTE, None) or apps.find(app)


def _run_now(apply: Callable[..., Any], app: Celery, name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
    recording.kept(app, name, args, kwargs, options)
    token = _sent.set(None)  # it runs now, and what its code runs by `apply` is not sent
    try:
        with denied_join_result():
            return apply(args, kwargs, **options)
    finally:
        _sent.reset(token)


def _places(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters after `args` and `kwargs`, which a caller may give by position."""
    names = list(inspect.signature(function).parameters)
    return names[names.index("kwargs") + 1 :]


def waits(db: apps.Served, asked: bool | None, task: Any, parent_id: str | None = None) -> bool:
    """Tell whether what is sent now is to wait: as the call says, else the task, else the setting.

    Args:
        parent_id: The option of that name, as the caller has given it.
    """
    order = _ordered.get()
    if order is not None and order.session is not None:
        return True
    if not db.units.is_open():
        return (
            False  # first, for most of what is sent is sent outside, and by programs that may read no setting of ours
        )
    if order is not None:
        return True
    wish = asked if asked is not None else getattr(task, OPTION, None)
    if wish is None:
        wish = db.settings.enqueue_on_commit
    return bool(wish) and not _is_celerys_own(parent_id)


def _session_with_outbox(db: apps.Served) -> Session | None:
    """Return the Session whose transaction the message is to be written into; None where there is no outbox for it."""
    if not db.settings.outbox:
        return None
    order = _ordered.get()
    if order is not None and order.session is not None:
        session = plain_session(order.session)
        owner = owner_of(session)
        return None if isinstance(owner, UnitOfWork) and owner.database != DEFAULT else session
    unit = db.units.current()
    return None if unit.read_only or not unit.commits or unit.database != DEFAULT else unit.session


def register(db: apps.Served, sending: Sending | outbox.Stored) -> None:
    """Send after the COMMIT of the Session that was named, or of the current unit of work."""
    order = _ordered.get()
    raises = order is not None and order.raises
    if order is not None and order.session is not None:
        on_commit_of(order.session, sending, raises=raises)
    else:
        db.units.current().on_commit(sending, raises=raises)


def snapshot(app: Celery, args: Any, kwargs: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return the arguments as the receiver will see them.

    Raises:
        kombu.exceptions.EncodeError: they cannot be serialised.
    """
    serializer = options.get("serializer") or app.conf.task_serializer
    if serializer == "json" and _is_flat(args) and _is_flat(kwargs.values() if kwargs else None):
        return (tuple(args) if args is not None else None), (dict(kwargs) if kwargs is not None else None)
    content_type, encoding, data = serialization.dumps((args, kwargs), serializer)
    copied_args, copied_kwargs = serialization.loads(data, content_type, encoding, accept=[content_type])
    return (tuple(copied_args) if copied_args is not None else None), copied_kwargs


def _is_flat(values: Any) -> bool:
    """Tell whether `values` are such that JSON gives them back as they are, and nobody can change them meanwhile."""
    return not values or (type(values) in _SEQUENCES and all(type(value) in _FLAT for value in values))


@contextmanager
def sent_by_celery() -> Iterator[None]:
    """Let what the block sends go at once: it is a retry or a replacement, which Celery sends itself."""
    token = _celerys_own.set(True)
    try:
        yield
    finally:
        _celerys_own.reset(token)


def _is_celerys_own(parent_id: str | None) -> bool:
    """Tell whether Celery itself sends: a retry, a replacement, links, chain, chord and error callbacks never wait.

    The last four are sent by the tracer, when the request that it runs has left its unit of work. It names this request
    as their parent, where user code leaves that to Celery.
    """
    if _celerys_own.get():
        return True
    request = running_request()
    if request is None or any(entry.request is request for entry in open_entries()):
        return False
    return is_over(request) or (parent_id is not None and parent_id == request.id)
