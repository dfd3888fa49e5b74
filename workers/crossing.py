"""Code of any thread that works on an Engine of an event loop: with a driver that is for asyncio alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from ..strategies.asynchronous import loop_thread
from ..strategies.asynchronous.strategy import PerLoopStrategy
from ..strategies.place import current_coroutine
from ..strategies.scope import runs_in_greenlet
from .errors import ConfigurationError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

WHAT_TO_WRITE = "Call it in a thread: `await asyncio.to_thread(...)`."


def on_its_loop(owner: Any, function: Callable[[], Result], instead: str = WHAT_TO_WRITE) -> Result:
    """Return what `function` does, called where the Engine of `owner` is: here, or on the event loop of the process.

    Args:
        owner: Has the strategy whose Engine `function` uses.
        instead: What to write in a coroutine, which cannot wait for it.
    Raises:
        ConfigurationError: a coroutine asks for it, whose event loop would stop.
    """
    if runs_in_greenlet() or not isinstance(owner.strategy, PerLoopStrategy):
        return function()
    thread = loop_thread.started()
    if current_coroutine() is not None:
        raise ConfigurationError(f"A coroutine asks for the database, and its event loop would stop for it. {instead}")
    return thread.run(function)


def on_their_loop(owners: Iterable[Any], function: Callable[[], Result]) -> Result:
    """Return what `function` does, called where it can use the Engines of all `owners`: on the event loop of the
    process if one of them belongs there."""
    awaited = next((owner for owner in owners if isinstance(owner.strategy, PerLoopStrategy)), None)
    return function() if awaited is None else on_its_loop(awaited, function)


def crossing(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let `function`, whose first argument is an Alchemy, run where the Engine of that is."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return on_its_loop(args[0], functools.partial(function, *args, **kwargs))

    return call
