"""What a call has asked for, for the time of the call: which COMMIT its messages wait for, or that they go at once."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

from sqlalchemy.orm import Session

Note = Callable[[str, Any, Any, dict[str, Any]], object]


class Order:
    """How messages are sent while it is in force."""

    __slots__ = ("_token", "at_once", "note", "raises", "result", "session", "unasked")
    raises: bool
    session: Session | None

    def __init__(
        self,
        session: Session | None = None,
        *,
        raises: bool = False,
        unasked: bool = False,
        at_once: bool = False,
        result: Any = None,
        note: Note | None = None,
    ) -> None:
        self.session, self.raises = session, raises
        self.unasked: bool = unasked
        """The caller has not asked for it, a setting has."""
        self.at_once: bool = at_once
        """They have waited: nothing waits now."""
        self.result: Any = result
        """What `send_task` is to return; None: a new result."""
        self.note: Note | None = note
        """Is told what `send_task` was called with."""

    def meets(self, name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> None:
        """Let `send_task`, which is called with these, return `result`."""
        if self.note is not None:
            self.note(name, args, kwargs, options)
        if self.result is not None:
            options["result_cls"] = lambda task_id: self.result

    def __enter__(self) -> None:
        self._token: Token[Order | None] = _ordered.set(self)

    def __exit__(self, *exc_info: object) -> None:
        _ordered.reset(self._token)


_ordered: ContextVar[Order | None] = ContextVar("celery_alchemy_order", default=None)
#: Returns the order that is in force; None: the task, the call and the setting decide.
ordered: Callable[[], Order | None] = _ordered.get


def on_commit(session: Session | None, *, raises: bool = False, unasked: bool = False) -> Order:
    """Let what the block sends wait for the COMMIT: of `session`, or of the unit of work that is running.

    Args:
        raises: As of `apply_async_on_commit`.
        unasked: The caller has not asked for it, a setting has.
    """
    return Order(session, raises=raises, unasked=unasked)


def at_once(result: Any = None, note: Note | None = None) -> Order:
    """Let nothing that the block sends wait: a call that has waited is made now.

    Args:
        result: Of the one message that the block sends, where it is made already.
        note: Is told what `send_task` is called with: the name, the arguments and the options.
    """
    return Order(at_once=True, result=result, note=note)


class without_order:  # noqa: N801 - used as a function is
    """Let the block send as if nothing had been asked for: an eager task runs, and what it sends is its own code's."""

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = _ordered.set(None)

    def __exit__(self, *exc_info: object) -> None:
        _ordered.reset(self._token)


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
