"""What stands on the stack of a thread or greenlet while a unit of work is open there."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from types import CodeType
from typing import Any

from sqlalchemy.orm import Session

from .hooks import UnitHook
from .interrupts import shield
from .names import printable
from .scope import Scope, here

#: A name, or the two parts of `task name[task id]`, or the line of code of a block: put together only when a message
#: needs them.
Label = str | tuple[str, str] | tuple[CodeType, int]

#: Kinds of entries: the body of a task, its own `__call__`, one of Celery's hooks; a block; an on_commit callback.
TASK_KINDS = frozenset({"run", "call", "hook"})


def written(label: Label) -> str:
    """Return the name of a unit of work, for messages."""
    if isinstance(label, str):
        return printable(label)
    first, second = label
    return printable(
        f"{first}[{second}]" if isinstance(first, str) else f"unit_of_work() at {first.co_filename}:{second}"
    )


@dataclass(frozen=True, slots=True)
class UnitOptions:
    """How the units of work of one task, or of a block, are treated; made once and looked at by each."""

    commits: bool = True
    """False: a good ending rolls back."""
    read_only: Any = False
    """What `features.read_only` was asked for; a task that is called like a function must agree with its caller."""
    hooks: tuple[UnitHook, ...] = ()
    """The features that follow it, `extra` among them."""
    extra: tuple[UnitHook, ...] = ()
    """Those of this task alone; they follow it on every database."""
    session_kind: type[Session] | None = None
    """A class that their Sessions are made of too: to change the class of one that is made costs more."""


class Entry:
    """What stands on the stack of a thread or greenlet: a unit of work, or a task that has joined one."""

    owns = False
    """Releases the unit of work when it leaves."""
    ends = False
    """Commits or rolls back when it leaves."""
    left = False
    """True once it has been taken off the stack."""
    kind: str
    holder: Any
    """The task that runs in it."""
    request: Any
    """Celery's request, for the Celery side."""
    registry: Any
    """The UnitOfWorkRegistry whose it is."""
    scope: Scope
    """Of the thread or greenlet that began it: `scope.units` is the stack it is on."""
    in_task = True
    """A task runs in it, or around it: only a helper thread or a script has none."""
    has_parts = False
    """It may be over several databases."""
    opened: Session | None = None
    """Its Session if it has been used, else None; of a unit of work alone."""
    ready: Session | None = None
    """The same, where nothing is to be done before it is used again."""
    coroutine: object = None
    """Of a block, what names the code that opened it: see `place`."""

    @property
    def unit(self) -> Any:
        """The unit of work that runs."""
        raise NotImplementedError

    @property
    def session(self) -> Session:
        """The Session of the unit of work, opened on first use."""
        session: Session = self.unit.session
        return session

    def succeed(self, *, final: bool) -> None:
        """End its unit of work well."""
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        """End its unit of work badly."""
        raise NotImplementedError


class Joined(Entry):
    """A task that was called like a function: it works in the unit of work of its caller."""

    ends: bool
    holder: Any
    kind: str
    request: Any

    def __init__(self, unit: Any, kind: str, holder: Any, request: Any, *, ends: bool) -> None:
        self._unit = unit
        self.kind, self.holder, self.request, self.ends = kind, holder, request, ends

    @property
    def unit(self) -> Any:
        return self._unit

    def succeed(self, *, final: bool) -> None:
        self._unit.succeed(final=final)

    def fail(self, error: BaseException) -> None:
        self._unit.fail(error)


@shield.covers
def take_off(entry: Entry) -> None:
    """Take `entry` off the stack it was put on, maybe that of another thread, which goes on meanwhile."""
    with suppress(ValueError):
        entry.scope.units.remove(entry)


@shield.covers
def move_here(entry: Entry) -> None:
    """Let a block that is left in another thread than it was entered in be on the stack of this one: what its end calls
    is inside of it. Web frameworks run the two halves of a dependency so."""
    scope = here()
    if entry.scope is not scope:
        take_off(entry)
        entry.scope = scope
        scope.units.append(entry)
