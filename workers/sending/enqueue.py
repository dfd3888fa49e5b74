"""Sending a task once the transaction that it belongs to is committed.

Everything that Celery sends goes through `app.send_task`: `delay`, `apply_async`, a canvas, a task by its name. There
a message is sent at once or registered for the COMMIT. By then Celery has checked the arguments; they are serialised
here too, so that what cannot be sent fails where it was asked for and what changes later is not seen. A task class that
overrides `apply_async` is asked before that: `calls`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery
from celery.result import denied_join_result
from celery.utils import uuid
from sqlalchemy.orm import Session

from ...strategies.errors import UnseenBlock
from ...strategies.features.foreign_sessions import on_commit_of, plain_session
from ...strategies.place import is_strange
from ...strategies.registry import open_entries
from ...strategies.sessions import owner_of
from ...strategies.unit_of_work import UnitOfWork
from .. import apps
from .._celery import known_task
from ..settings import DEFAULT
from . import orders, outbox, plain, recording, waiting_results
from .arguments import are_plain, explaining, snapshot, warn_of_none
from .celerys_own import is_celerys_own
from .following import open_session, session_to_wait_for
from .orders import ordered

OPTION = "enqueue_on_commit"
"""Of one call, and as an attribute of a task: wait for the commit (True) or send at once (False)."""
_OURS = "_celery_alchemy_send_task"


class Sending:
    """A message that waits for a COMMIT; calling it sends."""

    __slots__ = ("_name", "_send", "task_id")
    task_id: str

    def __init__(self, name: str, task_id: str, send: Callable[[], object]) -> None:
        self._name, self.task_id, self._send = name, task_id, send

    def __call__(self) -> Any:
        with orders.without_order():
            return self._send()

    def __repr__(self) -> str:
        return f"sending {self._name}[{self.task_id}]"


def attach(app: Celery) -> None:
    """Let the messages of `app` wait for a COMMIT where they are to."""
    if getattr(app.send_task, _OURS, False):
        return
    before = app.__dict__.get("send_task")  # of this app alone
    places = _places(app.send_task)

    def original(name: str, args: Any, kwargs: Any, **options: Any) -> Any:
        if before is not None:
            return before(name, args, kwargs, **options)
        # As its class has it now: tracing agents wrap that, and may do so later than this.
        return type(app).send_task(app, name, args, kwargs, **options)

    def send(name: str, args: Any, kwargs: Any, **options: Any) -> Any:
        if recording.ATTRIBUTE in app.__dict__ and recording.kept(app, name, args, kwargs, options):
            return recording.result_of(app, options.get("task_id") or uuid(), options)
        return original(name, args, kwargs, **options)

    @functools.wraps(app.send_task)
    def send_task(name: str, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        asked = options.pop(OPTION, None)
        if more:
            options |= zip(places, more, strict=False)
        collecting, order = outbox.collecting.get(), ordered()
        if collecting is None and order is not None and order.at_once:
            order.meets(name, args, kwargs, options)
            if before is None and recording.ATTRIBUTE not in app.__dict__:  # each call costs 20 keywords
                return type(app).send_task(app, name, args, kwargs, **options)
            return send(name, args, kwargs, **options)
        db = innermost(app)
        if collecting is not None and db is not None:
            return _store(app, db, original, collecting.append, name, args, kwargs, options)
        task = options.get("task_type") or known_task(app, name)
        if db is None or not waits(db, asked, task, options):
            if db is not None and (found := implied_session(db, asked, task, options)) is not None:
                with orders.on_commit(found, unasked=True):
                    return send_task(name, args, kwargs, **options)
            if db is not None:
                outbox.begin_now(db, options)
            return send(name, args, kwargs, **options)
        task_id = options["task_id"] = options.get("task_id") or uuid()
        plain = are_plain(args, kwargs)
        if not plain:
            warn_of_none(waited_session(db), name, task, args, kwargs)
        session = session_with_outbox(db)
        if session is not None:
            result = _store(app, db, original, functools.partial(register, db), name, args, kwargs, options)
            outbox.watch(db, session)
            return result
        result = _result(app, options)
        args, kwargs = snapshot(app, args, kwargs, options, plain)
        # Whatever it is that sends now, a group or a `with` of the caller, gives its producer back before the COMMIT.
        for producer in ("producer", "publisher"):
            options.pop(producer, None)
        options["result_cls"] = lambda task_id: result
        register(db, Sending(name, task_id, functools.partial(send, name, args, kwargs, **options)))
        return result

    _put_in_place(app, send_task, before)
    waiting_results.attach(app)


def surround(app: Celery, around: Callable[..., Any]) -> None:
    """Let each message of `app` be sent by `around(send, name, args, kwargs, options)`; `send` is what sends it now."""
    send = app.send_task
    places = _places(send)
    direct = plain.is_attached(app, send)

    @functools.wraps(send)
    def send_task(name: str, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        if more:
            options |= zip(places, more, strict=False)
        return around(send, name, args, kwargs, options)

    setattr(send_task, _OURS, True)
    app.send_task = send_task
    if direct:
        plain.attach(app, send_task)


def is_decided() -> bool:
    """Tell whether what is sent now has waited already, or is kept by who has called."""
    order = ordered()
    return outbox.collecting.get() is not None or (order is not None and order.at_once)


def store_now(
    db: apps.Served,
    name: str,
    args: Any,
    kwargs: Any,
    options: dict[str, Any],
    kind: type[outbox.Stored] = outbox.Stored,
    held: list[outbox.Delivery] | None = None,
) -> Any:
    """Write a message into the outbox, in a transaction of its own, and send it; return what `send_task` would
    return.

    Args:
        kind: What writes it.
        held: Takes what sends it, which is to come later.
    """
    app = db.app
    found: list[outbox.Stored] = []
    # As its class has it now: tracing agents wrap that.
    send = functools.partial(type(app).send_task, app)
    options.pop(OPTION, None)
    result = _store(app, db, send, found.append, name, args, kwargs, dict(options), kind)
    found[0].held = held
    found[0]()
    return result


def _put_in_place(app: Celery, send_task: Any, before: object) -> None:
    """Let `app` send by `send_task`. Messages whose COMMIT has come may go past it, where the app had none `before` of
    its own."""
    setattr(send_task, _OURS, True)
    app.send_task = send_task
    if before is None:
        plain.attach(app, send_task)


def _store(
    app: Celery,
    db: apps.Served,
    send: Callable[..., Any],
    add: Callable[[Any], object],
    name: str,
    args: Any,
    kwargs: Any,
    options: dict[str, Any],
    kind: type[outbox.Stored] = outbox.Stored,
) -> Any:
    """Give `add` a message that is written into the outbox; return what `send_task` would return."""
    options["task_id"] = options.get("task_id") or uuid()
    result = _result(app, options)
    kept = result if options.get("add_to_parent", True) else None
    with explaining(args, kwargs):
        message = kind(db, app, send, name, args, kwargs, options, kept)
    add(message)
    return result


def _result(app: Celery, options: dict[str, Any]) -> Any:
    """Return what `send_task` would return."""
    result = (options.get("result_cls") or app.AsyncResult)(options["task_id"])
    result.ignored = options.get("ignore_result")
    return result


def eagerly(task: Any, apply: Callable[..., Any], args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
    """Run a task of `task_always_eager` when a message would be sent; it does not pass through `app.send_task`."""
    asked = options.pop(OPTION, None)
    task_id = options["task_id"] = options.get("task_id") or uuid()
    app = task.app
    message = Sending(task.name, task_id, functools.partial(_run_now, apply, app, task.name, args, kwargs, options))
    db = innermost(app)
    session = implied_session(db, asked, task, options) if db is not None else None
    if session is not None:
        with orders.on_commit(session, unasked=True):
            register(db, message)
            return task.AsyncResult(task_id)
    if db is None or not waits(db, asked, task, options):
        return message()
    register(db, message)
    return task.AsyncResult(task_id)


def innermost(app: Celery) -> apps.Served | None:
    """Return the Alchemy whose unit of work is the innermost one here; that of the default database where there is
    none, or one over all."""
    known: dict[str, apps.Served] = app.__dict__.get(apps.ALL, {})
    if len(known) > 1:
        for entry in reversed(open_entries()):
            for db in known.values():
                if entry.registry is db.units and not is_strange(entry.coroutine):
                    return db
    return getattr(app, apps.ATTRIBUTE, None) or apps.find(app)


def _run_now(apply: Callable[..., Any], app: Celery, name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
    recording.kept(app, name, args, kwargs, options)
    with orders.sending(None), denied_join_result():  # it runs now, and what its code runs by `apply` is not sent
        return apply(args, kwargs, **options)


def _places(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters after `args` and `kwargs`, which a caller may give by position."""
    names = list(inspect.signature(function).parameters)
    return names[names.index("kwargs") + 1 :]


def waits(db: apps.Served, asked: bool | None, task: Any, options: Mapping[str, Any]) -> bool:
    """Tell whether what is sent now is to wait: as the call says, else the task, else the setting.

    Args:
        asked: The option `enqueue_on_commit` of the call.
        options: The others, as the caller has given them.
    """
    order = ordered()
    if order is not None:
        if order.at_once:
            return False
        if order.session is not None:
            return True
    if not db.units.is_open():
        # First, for most of what is sent is sent outside, and by programs that may read no setting of ours.
        return order is not None and _waits_outside(db, order, task)
    return order is not None or _is_wished(db, asked, task, options)


def _is_wished(db: apps.Served, asked: bool | None, task: Any, options: Mapping[str, Any]) -> bool:
    wish = asked if asked is not None else getattr(task, OPTION, None)
    if wish is None:
        wish = db.settings.enqueue_on_commit
    return bool(wish) and not is_celerys_own(options)


def _waits_outside(db: apps.Served, order: orders.Order, task: Any) -> bool:
    """Let `order` wait for the Session of a web request; where there is none, all that it sends goes at once."""
    assert db.app is not None
    order.session = session_outside(db.app, task)
    order.at_once = order.session is None
    return not order.at_once


def session_outside(app: Celery, task: Any) -> Any:
    """Return the Session that a message of `task`, sent outside a unit of work, is to wait for; None: nothing."""
    name = getattr(task, "name", None)
    return session_to_wait_for(app, f"{name}.delay_on_commit()" if name else "db.delay_on_commit()")


def implied_session(db: apps.Served, asked: bool | None, task: Any, options: Mapping[str, Any]) -> Any:
    """Return the Session of a web request that an ordinary `delay()` is to wait for; None: of none."""
    if ordered() is not None or asked is False or db.units.is_open():
        return None
    try:
        session = open_session(db.app)
    except UnseenBlock:
        if _is_wished(db, asked, task, options):
            raise
        return None
    return session if session is not None and _is_wished(db, asked, task, options) else None


def waited_session(db: apps.Served) -> Session | None:
    """Return the Session whose COMMIT is waited for; None where it has not been used yet."""
    order = ordered()
    if order is not None and order.session is not None:
        return plain_session(order.session)
    opened: Session | None = db.units.current().opened
    return opened


def session_with_outbox(db: apps.Served) -> Session | None:
    """Return the Session whose transaction the message is to be written into; None where there is no outbox for it."""
    if not db.settings.outbox:
        return None
    order = ordered()
    if order is not None and order.session is not None:
        session = plain_session(order.session)
        owner = owner_of(session)
        if isinstance(owner, UnitOfWork):
            return session if owner.database == DEFAULT else None
        outbox.refuse_other_database(db, session)
        return session
    unit = db.units.current()
    return None if unit.read_only or unit.database != DEFAULT else unit.session


def register(db: apps.Served, sending: Any, *, raises: bool = False) -> None:
    """Send after the COMMIT of the Session that was named, or of the current unit of work.

    Args:
        sending: Is called after it; has the `task_id` of its message.
        raises: Its error is raised to whoever commits, even where the order does not ask for that.
    """
    order = ordered()
    raises = raises or (order is not None and order.raises)
    if order is not None and order.session is not None:
        on_commit_of(order.session, sending, raises=raises, unasked=order.unasked)
    else:
        db.units.current().on_commit(sending, raises=raises)
