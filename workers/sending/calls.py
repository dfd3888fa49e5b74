"""A whole `apply_async` that waits for the COMMIT, not only the message that it would send.

So it is for a task class that overrides `apply_async`: what that does (locks, headers, the tenant) happens when the
message is sent, and a rollback leaves nothing of it. So it is too for arguments that are made late.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery import Task
from celery.utils import uuid
from sqlalchemy.orm import Session

from ...strategies._sqlalchemy import is_preparing, listen_to
from ...strategies.features.foreign_sessions import plain_session
from ...strategies.features.on_event_loop import run_in_thread
from ...strategies.interrupts import is_interrupt
from ...strategies.on_commit import Callback, CommitCallbacks
from ...strategies.scope import runs_in_greenlet
from ...strategies.sessions import waiting_of
from .. import apps
from .._celery import pydantic_dump
from . import orders, outbox
from .arguments import refuse_sessions, snapshot, warn_of_none
from .enqueue import OPTION, implied_session, innermost, register, session_with_outbox, waited_session, waits
from .late import has_late, made
from .orders import ordered

logger: logging.Logger = logging.getLogger(__name__)

_MARK = "_celery_alchemy_passes_on"
_DEFERS = "_celery_alchemy_defers"
_WATCHED = "celery_alchemy.calls"
#: The parameters of Celery's `apply_async` after `args` and `kwargs`, which a caller may give by position.
_PLACES = ("task_id", "producer", "link", "link_error", "shadow")


class Call:
    """A call of `apply_async` that waits for a COMMIT.

    Args:
        name: Of the task, or what stands for it.
        task_id: What the message will have.
        send: Is called with the arguments and the options of `apply_async`.
        args: The arguments, some of them perhaps late.
        prepare: Returns arguments as they are to be sent; raises where they cannot be.
        raises: What `send` raises is raised to whoever commits.
    """

    __slots__ = (
        *("__weakref__", "_name", "_prepare", "_raises", "_was_late"),
        *("args", "is_late", "kwargs", "options", "send", "task_id"),
    )
    args: Any
    is_late: bool
    kwargs: Any
    options: dict[str, Any]
    send: Callable[..., Any]
    task_id: str

    def __init__(
        self,
        name: str,
        task_id: str,
        send: Callable[..., Any],
        args: Any,
        kwargs: Any,
        options: dict[str, Any],
        prepare: Callable[[Any, Any], tuple[Any, Any]],
        *,
        raises: bool,
    ) -> None:
        self._name, self.task_id, self.send, self.options = name, task_id, send, options
        self._prepare, self._raises = prepare, raises
        self.is_late = self._was_late = has_late(args, kwargs)
        """Whether arguments are still to be made."""
        self.args, self.kwargs = (args, kwargs) if self.is_late else prepare(args, kwargs)

    def make(self) -> None:
        """Make the arguments that are late."""
        if self.is_late:
            self.args, self.kwargs = self._prepare(*made(self.args, self.kwargs))
            self.is_late = False

    def __call__(self) -> None:
        """Send; arguments that are still late are made now, for there was no transaction."""
        self.make()
        try:
            with orders.at_once():
                self.returned(self.send(self.args, self.kwargs, **self.options))
        except Exception as error:
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """Treat what `send` has raised as an on_commit callback's error; what makes an argument is to be raised, and so
        all that a call with late arguments raises would be."""
        if not self._was_late or self._raises or is_interrupt(error):
            raise error
        logger.error("%r failed; the transaction it waited for is committed", self, exc_info=error)

    def returned(self, result: Any) -> None:
        """Say where nothing was sent under the id of the call."""
        other = getattr(result, "id", None)
        if other != self.task_id:
            logger.info(
                "%r: it was not sent under this id, for apply_async of the task returned %s",
                self, f"the result of {other}" if other else repr(result),
            )  # fmt: skip

    def __repr__(self) -> str:
        return f"sending {self._name}[{self.task_id}]"


class OutgoingCall(Call, outbox.Outgoing):
    """A call whose messages are written into the outbox: it is made just before the COMMIT."""

    __slots__ = ()

    def stored(self) -> Sequence[outbox.Stored]:
        """Return the messages, for one that was registered too late to be made before: in the COMMIT itself."""
        stored = []
        for part in self.parts():
            if isinstance(part, outbox.Stored):
                stored.append(part)
            elif isinstance(part, _Failed):
                logger.error("%r failed; the transaction it waited for goes on", self, exc_info=part.error)
        return stored

    def parts(self) -> Sequence[Callback]:
        """Return what takes the place of the call before the COMMIT: its messages, and its error.

        An error of the call fails no transaction: it is reported after the COMMIT, as without an outbox.
        """
        self.make()
        failed: list[Callback] = []
        with orders.at_once(), outbox.collected() as stored:
            try:
                self.returned(self.send(self.args, self.kwargs, **self.options))
            except Exception as error:
                if is_interrupt(error):
                    raise
                failed.append(_Failed(self, error))
        return [*stored, *failed]


class _Failed:
    """Raises, after the COMMIT, what a call raised before it."""

    def __init__(self, call: Call, error: Exception) -> None:
        self._call, self.error = call, error

    def __call__(self) -> None:
        self._call.failed(self.error)

    def __repr__(self) -> str:
        return repr(self._call)


def passes_on(method: Callable[..., Any]) -> Callable[..., Any]:
    """Mark an `apply_async` of ours, which adds nothing to Celery's own."""
    setattr(method, _MARK, method)
    return method


def _is_ours(method: Any) -> bool:
    """Tell whether `method` is one of ours; a decorator that copies our attributes (functools.wraps) is not."""
    return getattr(method, _MARK, None) is method


def overrides(cls: type, *names: str) -> bool:
    """Tell whether a class of the user's, among the bases of the task class `cls`, has a method of its own of these."""
    own = [base for base in cls.__mro__ if base is not Task]
    return any(name in vars(base) and not _is_ours(vars(base)[name]) for base in own for name in names)


def sends_plainly(cls: type) -> bool:
    """Tell whether `delay_on_commit` ends in Celery's own `apply_async`, with its arguments as they are."""
    own = overrides(cls, "apply_async", "apply_async_on_commit", "AsyncResult", "shadow_name")
    return pydantic_dump(cls) is None and not own


def defer_overrides(cls: type) -> None:
    """Let the `apply_async` of the task class `cls` wait as a whole, if a class of the user's overrides it."""
    raw = inspect.getattr_static(cls, "apply_async")
    if overrides(cls, "apply_async") and inspect.isfunction(raw) and not (_is_ours(raw) and hasattr(raw, _DEFERS)):
        cls.apply_async = _deferring(raw)  # type: ignore[attr-defined]


def _deferring(raw: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(raw)
    def apply_async(self: Any, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        return send(functools.partial(raw, self), self, args, kwargs, more, options)

    setattr(apply_async, _DEFERS, True)
    return passes_on(apply_async)


def send(
    apply_async: Callable[..., Any], task: Any, args: Any, kwargs: Any, more: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """Call `apply_async` of `task` now, or when the COMMIT has come that it is to wait for."""
    db = innermost(task.app)
    asked = options.get(OPTION)
    if more and len(more) <= len(_PLACES):
        options, more = {**dict(zip(_PLACES, more, strict=False)), **options}, ()
    if db is None or not waits(db, asked, task, options):
        if db is not None and (session := implied_session(db, asked, task, options)) is not None:
            with orders.on_commit(session, unasked=True):
                return send(apply_async, task, args, kwargs, more, options)
        if has_late(args, kwargs):
            args, kwargs = made(args, kwargs)
        return apply_async(args, kwargs, *more, **options)
    options.pop(OPTION, None)
    check = getattr(task, "__header__", None)  # a task class that was registered by hand has none
    if task.typing and check is not None:
        check(*(args or ()), **(kwargs or {}))
    options["task_id"] = task_id = options.get("task_id") or uuid()
    prepare = functools.partial(_prepare, task, options)
    defer(db, task.name, task_id, apply_async, args, kwargs, options, prepare, task=task)
    result = task.AsyncResult(task_id)
    result.ignored = options.get("ignore_result", task.ignore_result)
    return result


def _prepare(task: Any, options: Mapping[str, Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    dump = pydantic_dump(type(task))
    if dump is not None and options.get("serializer") != "pickle":
        args, kwargs = dump(args, kwargs)
    serializer = options.get("serializer") or task.serializer
    return snapshot(task.app, args, kwargs, {"serializer": serializer})


def defer(
    db: apps.Served,
    name: str,
    task_id: str,
    apply_async: Callable[..., Any],
    args: Any,
    kwargs: Any,
    options: dict[str, Any],
    prepare: Callable[[Any, Any], tuple[Any, Any]],
    task: Any = None,
) -> None:
    """Call `apply_async(args, kwargs, **options)` when the COMMIT has come; with an outbox just before it."""
    order = ordered()
    for producer in ("producer", "publisher"):
        options.pop(producer, None)
    if options.get("headers"):
        options["headers"] = dict(options["headers"])
    refuse_sessions(name, args, kwargs)
    warn_of_none(waited_session(db), name, task, args, kwargs)
    raises = order is not None and order.raises
    # A task that is run eagerly is run after the COMMIT; it has no message to be written down.
    session = None if db.app.conf.task_always_eager else session_with_outbox(db)
    kind = Call if session is None else OutgoingCall
    call = kind(name, task_id, apply_async, args, kwargs, options, prepare, raises=raises)
    register(db, call, raises=call.is_late)
    if session is not None:
        outbox.watch(db, session)
    if session is not None or call.is_late:
        _watch(session or _session(db))


def _session(db: apps.Served) -> Session:
    order = ordered()
    if order is not None and order.session is not None:
        return plain_session(order.session)
    session: Session = db.units.current().session
    return session


def _watch(session: Session) -> None:
    """Before the COMMIT of `session`, make what is late, and with an outbox the calls themselves."""
    if _WATCHED in session.info:
        return
    session.info[_WATCHED] = True
    if not is_preparing(session):
        listen_to(session, "before_commit", _before_commit)
        return
    try:
        _before_commit(session)  # now: its listeners are being called already
    finally:
        del session.info[_WATCHED]


def _before_commit(session: Session) -> None:
    waiting = waiting_of(session)
    if waiting is not None and not session.in_nested_transaction():  # a savepoint is released, nothing is committed
        while _make(session, waiting):
            pass
        if waiting.of(OutgoingCall):
            store = functools.partial(waiting.exchange, OutgoingCall, OutgoingCall.parts)
            # A lock in Redis is not to stop an event loop.
            run_in_thread(store) if runs_in_greenlet() else store()


def _make(session: Session, waiting: CommitCallbacks) -> bool:
    """Make what is late; return whether there was anything: what makes it may send more."""
    late = [call for call in waiting.of(Call) if call.is_late]
    if late:
        session.flush()
    for call in late:
        call.make()
    return bool(late)
