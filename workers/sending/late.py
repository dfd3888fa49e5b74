"""Arguments that are made just before the COMMIT, when the flush has given new rows their ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from ...strategies.errors import CeleryAlchemyError
from ...strategies.names import type_of


class Late:
    """An argument that is made later; `late` makes it."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def made(self) -> Any:
        """Return the argument."""
        return self._make()

    def __deepcopy__(self, memo: Any) -> Late:
        return self

    def __json__(self) -> NoReturn:
        raise CeleryAlchemyError(_MISPLACED)

    def __reduce__(self) -> NoReturn:
        raise CeleryAlchemyError(_MISPLACED)

    def __repr__(self) -> str:
        return "late(...)"


_MISPLACED = (
    "late(...) stands where it is not made: inside of another argument, in a later task of a chain, in the body of a "
    "chord, or in a plain delay() of a task that is no DatabaseTask. It is made among the arguments themselves of "
    "delay_on_commit and apply_async_on_commit, and of delay() and apply_async() of a DatabaseTask."
)


def late(make: Callable[[], Any]) -> Any:
    """Return an argument that `make` makes just before the COMMIT, after the flush: the id of a new row.

        session.add(user)
        welcome.delay_on_commit(late(lambda: user.id))

    What `make` raises fails the transaction. Where there is nothing to wait for, it is made at once.

    Args:
        make: Is called once, without arguments.
    Raises:
        CeleryAlchemyError: `make` cannot be called.
    """
    if not callable(make):
        raise CeleryAlchemyError(
            f"late() got {type_of(make)}, but it needs a function: late(lambda: user.id) makes the argument "
            f"after the flush, late(user.id) would be too early."
        )
    return Late(make)


def has_late(args: Any, kwargs: Any) -> bool:
    """Tell whether any of these arguments is made later."""
    for value in args or ():  # each message pays for this: no generator
        if type(value) is Late:
            return True
    return bool(kwargs) and Late in map(type, kwargs.values())


def made(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments, each of them made."""

    def one(value: Any) -> Any:
        return value.made() if type(value) is Late else value

    return (
        tuple(one(value) for value in args) if args is not None else None,
        {name: one(value) for name, value in kwargs.items()} if kwargs is not None else None,
    )
