"""What code has put on `db.engine`, for the Engine that takes its place.

`db.engine` may be one Engine at import, another in prefork's main process, and under `per_process` one more in each
pool process. A listener that was put on one of them is meant for all.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from .._sqlalchemy import listeners_of
from .leaks import describe, find_origin

logger: logging.Logger = logging.getLogger(__name__)

#: Of an Engine, its connection pool or its dialect (`engine`, `pool`, `dialect`); the event; what is called.
Put = tuple[str, str, Callable[..., Any]]
#: Those whose listeners return something, or are wrapped to.
_RETURNING = frozenset({("engine", "before_execute"), ("engine", "before_cursor_execute")})
_DEEPEST = 4


class _Made:
    """What an Engine came with when it was put in its place."""

    def __init__(self, engine: Engine) -> None:
        self.engine = weakref.ref(engine)
        self.options = dict(engine.get_execution_options())
        self.ids: set[tuple[str, str, int]] = set()
        self.kinds: Counter[object] = Counter()
        self._add(_all_of(engine))

    def _add(self, listeners: list[Put]) -> None:
        self.ids.update(map(_id_of, listeners))
        self.kinds.update(map(_kind_of, listeners))

    @contextmanager
    def coming_with(self) -> Iterator[None]:
        """What is put on the Engine in this block, it came with."""
        engine = self.engine()
        before = {_id_of(one) for one in _all_of(engine)}
        yield
        self._add([one for one in _all_of(engine) if _id_of(one) not in before])

    def added(self) -> list[Put]:
        """Return what listens to the Engine by now beside that."""
        return [one for one in _all_of(self.engine()) if _id_of(one) not in self.ids]

    def added_options(self) -> dict[str, Any]:
        """Return the execution options that it has by now beside that."""
        engine = self.engine()
        now = engine.get_execution_options() if engine is not None else {}
        return {name: value for name, value in now.items() if self.options.get(name, now) is not value}


class Succession:
    """The Engines that were `db.engine`, one after another.

    Listeners (of the Engine, its connection pool, its dialect) and execution options that code has added to one are
    put on the next. What an Engine comes with, the next one has by itself: listeners of ours and of `db.on_engine`,
    and those of a tool that puts them on each Engine that is made.
    """

    def __init__(self) -> None:
        self._current: Engine | None = None
        self._made: list[_Made] = []
        self._left: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._warned: set[str] = set()

    def succeed(self, engine: Engine) -> Engine | None:
        """Let `engine` be `db.engine` from now on, with what was put on those before it.

        Returns:
            The one that it was; None where it is the first, or was it already.
        """
        previous, self._current = self._current, engine
        if previous is engine:
            return None
        self._made = [one for one in self._made if one.engine() not in {None, engine}]
        made = _Made(engine)
        for earlier in self._made:
            _put(engine, earlier, made)
        self._made.append(made)
        if previous is not None:
            self.leave(previous)
        return previous

    def ours(self, engine: Engine) -> AbstractContextManager[None]:
        """What is put on `engine` in this block, the next Engine gets by itself."""
        made = next((one for one in self._made if one.engine() is engine), None)
        return made.coming_with() if made is not None else nullcontext()

    def leave(self, engine: Engine) -> None:
        """Say so, once for each line of code, when `engine` is used although it is not `db.engine` any more."""
        if engine not in self._left:
            self._left.add(engine)
            with self.ours(engine):
                event.listen(engine, "connect", self._warn)

    def _warn(self, *_: object) -> None:
        place = describe(find_origin())
        if place not in self._warned:
            self._warned.add(place)
            logger.warning(
                "%s uses an Engine that was db.engine before the worker started, or before this process was forked; "
                "now it is another one (pid %s). What was kept, in a sessionmaker(bind=db.engine) say, works, but has "
                "connections apart from those of db.engine, and is no part of a unit of work. Ask for db.engine where "
                "you use it, or use db.session. Listeners follow to the new Engine by themselves.", place, os.getpid(),
            )  # fmt: skip


def _put(engine: Engine, earlier: _Made, made: _Made) -> None:
    """Put on `engine`, which came as `made`, what was added to an `earlier` one."""
    options = earlier.added_options()
    if options:
        with made.coming_with():  # some are kept by listeners
            engine.update_execution_options(**options)
    # A tool that was switched on meanwhile has put its listeners on the earlier one when it was asked to, and on this
    # one by itself.
    by_itself = made.kinds - earlier.kinds
    targets, there = _targets(engine), {_id_of(one) for one in _all_of(engine)}
    for one in earlier.added():
        target, name, listener = one
        if by_itself[_kind_of(one)] > 0:
            by_itself[_kind_of(one)] -= 1
        elif _id_of(one) not in there:
            returning = {"retval": True} if (target, name) in _RETURNING else {}
            event.listen(targets[target], name, listener, **returning)


def _targets(engine: Engine) -> dict[str, Any]:
    return {"engine": engine, "pool": engine.pool, "dialect": engine.dialect}


def _all_of(engine: Engine | None) -> list[Put]:
    targets = _targets(engine) if engine is not None else {}
    return [(name, *one) for name, target in targets.items() for one in listeners_of(target)]


def _id_of(one: Put) -> tuple[str, str, int]:
    return one[0], one[1], id(one[2])


def _kind_of(one: Put) -> object:
    return one[0], one[1], _code_of(one[2])


def _code_of(listener: Any, depth: int = _DEEPEST) -> object:
    """Return what is the same for the listeners that a tool puts on each Engine: their code, and that of what they are
    wrapped around."""
    function = getattr(listener, "__func__", listener)
    inner = []
    for cell in (getattr(function, "__closure__", None) or ()) if depth else ():
        try:
            content = cell.cell_contents
        except ValueError:  # not set yet
            continue
        if callable(content):
            inner.append(_code_of(content, depth - 1))
    return getattr(function, "__code__", type(function)), tuple(inner)
