"""For tests: the messages that an app would send, kept instead of sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from celery import Celery, Task
from celery.result import AsyncResult

from ...strategies.names import counted

ATTRIBUTE = "_celery_alchemy_recorder"
"""Of an app: takes what would be sent; not there outside of tests."""
_ANY = object()


class Message(NamedTuple):
    """A message that would have been sent."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: dict[str, Any]
    """Of `apply_async`: queue, countdown, task_id and so on."""


class Enqueued:
    """The messages that an app would have sent so far, in their order."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages)

    def __len__(self) -> int:
        return len(self.messages)

    def clear(self) -> None:
        """Forget what was sent so far."""
        self.messages.clear()

    def of(self, task: Task[..., Any] | str) -> list[Message]:
        """Return the messages of one task."""
        name = task if isinstance(task, str) else task.name
        return [message for message in self.messages if message.name == name]

    def assert_enqueued(
        self,
        task: Task[..., Any] | str,
        args: Any = _ANY,
        kwargs: Any = _ANY,
        *,
        count: int | None = None,
        **options: Any,
    ) -> Message:
        """Fail unless the task was sent with these arguments; return the last such message.

        Args:
            args: The positional arguments; left out, any will do. So with `kwargs`.
            count: Exactly so many times; left out, at least once.
            options: What the message has of `apply_async`'s options, for example `queue="slow"`.
        """
        __tracebackhide__ = True  # pytest shows the line of the test
        found = [
            message
            for message in self.of(task)
            if (args is _ANY or message.args == tuple(args or ()))
            and (kwargs is _ANY or message.kwargs == dict(kwargs or {}))
            and all(message.options.get(name) == value for name, value in options.items())
        ]
        wanted = f"{task if isinstance(task, str) else task.name}" + "".join(
            f" {name}={value!r}"
            for name, value in {"args": args, "kwargs": kwargs, **options}.items()
            if value is not _ANY
        )
        if not found or (count is not None and len(found) != count):
            times = "at least once" if count is None else counted(count, "time")
            raise AssertionError(
                f"{wanted} was to be sent {times}, and was sent {counted(len(found), 'time')}.{self._what_was()}"
            )
        return found[-1]

    def assert_not_enqueued(self, task: Task[..., Any] | str) -> None:
        """Fail if the task was sent."""
        __tracebackhide__ = True
        if self.of(task):
            name = task if isinstance(task, str) else task.name
            raise AssertionError(f"{name} was not to be sent.{self._what_was()}")

    def _what_was(self) -> str:
        sent = "".join(
            f"\n  {message.name} args={message.args!r} kwargs={message.kwargs!r}" for message in self.messages
        )
        return f" Sent so far:{sent or ' nothing'}"


@contextmanager
def recording(app: Celery) -> Iterator[Enqueued]:
    """Keep what `app` would send in the block; eager tasks are kept too, and run."""
    before = app.__dict__.get(ATTRIBUTE)
    enqueued = app.__dict__[ATTRIBUTE] = Enqueued()
    try:
        yield enqueued
    finally:
        if before is None:
            del app.__dict__[ATTRIBUTE]
        else:
            app.__dict__[ATTRIBUTE] = before


def kept(app: Celery, name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> bool:
    """Keep a message that is about to be sent, if a test wants it; called for every one."""
    enqueued: Enqueued | None = app.__dict__.get(ATTRIBUTE)
    if enqueued is None:
        return False
    enqueued.messages.append(Message(name, tuple(args or ()), dict(kwargs or {}), options))
    return True


def result_of(app: Celery, task_id: str, options: dict[str, Any]) -> Any:
    """Return what `send_task` would return for a message that was kept."""
    make: Callable[[str], AsyncResult] = options.get("result_cls") or app.AsyncResult
    return make(task_id)
