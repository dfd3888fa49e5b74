"""Sending a task by `delay_on_commit` with few and plain arguments, where nothing else has a say: most messages."""

from __future__ import annotations

from typing import Any

from celery import Celery, Task
from celery.app.routes import MapRoute
from celery.signals import after_task_publish, before_task_publish
from celery.utils import uuid

from ...strategies.scope import SCOPE, current_scope
from .. import apps
from .._celery import KnownCall, can_be_known
from . import orders, recording
from .arguments import PLAIN

_ATTRIBUTE = "_celery_alchemy_direct"


class Direct:
    """Of an app: what its messages may go past, and what is known of their tasks.

    Args:
        replacement: Its `send_task`, which is ours.
    """

    __slots__ = ("known", "replacement")

    def __init__(self, replacement: object) -> None:
        self.replacement: object = replacement
        self.known: dict[str, KnownCall] = {}
        """By the name of the task."""


class PlainSending:
    """A message that waits for a COMMIT; calling it makes the call of `apply_async` as it would be made by hand."""

    __slots__ = ("_app", "_args", "_direct", "_kwargs", "_result", "_task")

    def __init__(self, task: Any, app: Celery, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._task, self._app, self._result, self._args, self._kwargs = task, app, result, args, kwargs
        self._direct: Direct | None = None

    @property
    def task_id(self) -> str:
        """The id of its message."""
        found: str = self._result.id
        return found

    @property
    def needs_unit(self) -> bool:
        """Whether code of the user's runs in it, which may use the database and send: a receiver, a router, a
        `send_task` that somebody has put over ours."""
        own = self._app.__dict__
        direct = own.get(_ATTRIBUTE)
        if (
            direct is None
            or own.get("send_task") is not direct.replacement
            or recording.ATTRIBUTE in own
            or before_task_publish.receivers
            or after_task_publish.receivers
        ):
            return True
        amqp = own.get("amqp") or self._app.amqp  # `cached_property` of kombu costs as much as all of this
        for route in amqp.routes:  # no generator
            if type(route) is not MapRoute:
                return True
        self._direct = direct
        return False

    def __call__(self) -> Any:
        direct, task, app = self._direct, self._task, self._app
        if direct is not None:
            known = direct.known.get(task.name)
            if known is not None and known.fits(task, app):
                # As its class has it now: tracing agents wrap that, and may do so later than this.
                return type(app).send_task(
                    app, task.name, self._args, self._kwargs,
                    task_id=self._result.id, result_cls=self._made, **known.options,
                )  # fmt: skip
        note = self._note if direct is not None and can_be_known(task) else None
        with orders.at_once(self._result, note), orders.sending(task):
            return Task.apply_async(task, self._args, self._kwargs, task_id=self._result.id)

    def __repr__(self) -> str:
        return f"sending {self._task.name}[{self._result.id}]"

    def _made(self, task_id: str) -> Any:
        return self._result

    def _note(self, name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> None:
        """Remember what `apply_async` calls `send_task` with, where it is the same for each message."""
        task, direct, of_task = self._task, self._direct, dict(options)
        if (
            direct is not None
            and name == task.name
            and args is self._args
            and kwargs is self._kwargs
            and of_task.pop("task_id", None) == self._result.id
            and of_task.pop("result_cls", None) is not None
        ):
            direct.known[name] = KnownCall(task, of_task)


def send_plain(task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Send `task` after the COMMIT of the unit of work that runs here, where nothing else has a say.

    Returns:
        The result; None, and nothing has happened, where arguments, task or settings want more to be looked at.
    """
    scope = getattr(current_scope(), SCOPE, None)
    entry = scope.units[-1] if scope is not None and scope.units else None
    if (
        entry is None
        or entry.coroutine is not None  # a block, which may be of other code
        or entry.has_parts
        or task.serializer != "json"
        or (args and not PLAIN.issuperset(map(type, args)))
        or (kwargs and not PLAIN.issuperset(map(type, kwargs.values())))
    ):
        return None
    app = task.app
    db = getattr(app, apps.ATTRIBUTE, None)
    if db is None or db.units is not entry.registry or db.settings.outbox:
        return None
    if task.typing:
        task.__header__(*args, **kwargs)
    result = task.AsyncResult(uuid())
    result.ignored = task.ignore_result
    entry.unit.on_commit(PlainSending(task, app, result, args, kwargs))
    return result


def is_attached(app: Celery, replacement: object) -> bool:
    """Tell whether messages of `app` may go past `replacement`."""
    direct: Direct | None = app.__dict__.get(_ATTRIBUTE)
    return direct is not None and direct.replacement is replacement


def attach(app: Celery, replacement: object) -> None:
    """Let messages of `app` whose COMMIT has come go past its `send_task`, which is `replacement`."""
    setattr(app, _ATTRIBUTE, Direct(replacement))
