"""Arguments of the bench commands, checked before anything starts."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from ..patterns import OURS, PATTERNS, POOLS
from ..workloads import WORKLOADS
from .contests import AUTO, STRATEGIES
from .objective import Objective

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    # Generic only since click 8.4.
    _ParamType = click.ParamType

BASELINES = tuple(name for name in PATTERNS if name != OURS)
CONTESTS = ("patterns", "pools", "round-trips")


def suggest(value: str, known: Sequence[str]) -> str:
    """Return the nearest known spelling, and all of them."""
    near = difflib.get_close_matches(value, known, n=1)
    return (f"Did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(known)}."


class Names(_ParamType):
    """Some of the known names, separated by commas; `all`, or `none` where nothing will do."""

    name = "names"

    def __init__(
        self, what: str, known: Sequence[str], *, none: bool = False, check: Callable[[str], str] | None = None
    ) -> None:
        self._what, self._known, self._none, self._check = what, known, none, check

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return what the help shows."""
        return f"{'|'.join((*self._known[:3], '...') if len(self._known) > 4 else self._known)}|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """Return the names, each once, in the order given."""
        if isinstance(value, list):
            return value
        names = list(dict.fromkeys(name.strip() for name in str(value).split(",") if name.strip()))
        if names == ["all"]:
            names = list(self._known)
        elif names == ["none"] and self._none:
            names = []
        elif not names:
            self.fail(f"{value!r} names no {self._what}. Known: {', '.join(self._known)}.", param, ctx)
        for name in names:
            if name not in self._known:
                self.fail(f"{name!r} is not a {self._what}. {suggest(name, self._known)}", param, ctx)
            if refusal := self._check(name) if self._check else "":
                self.fail(refusal, param, ctx)
        return names


def _pool_refusal(name: str) -> str:
    missing = name in {"gevent", "eventlet"} and find_spec(name) is None
    return f"{name} is not installed: pip install 'celery-alchemy[{name}]'." if missing else ""


def _pattern_refusal(name: str) -> str:
    missing = name == "flask" and find_spec("flask_sqlalchemy") is None
    return "flask needs Flask-SQLAlchemy: pip install 'celery-alchemy[loadtest]'." if missing else ""


POOL_NAMES = Names("worker pool", POOLS, check=_pool_refusal)
WORKLOAD_NAMES = Names("workload", tuple(WORKLOADS))
BASELINE_NAMES = Names("hand-written pattern", BASELINES, none=True, check=_pattern_refusal)
CONTEST_NAMES = Names("kind of contest", CONTESTS)


class StrategyNames(Names):
    """Session strategies: ours, registered ones, or `package.module:Class`."""

    def __init__(self) -> None:
        registered = (point.name for point in entry_points(group="celery_alchemy.strategies"))
        super().__init__("session strategy", (AUTO, *dict.fromkeys((*STRATEGIES, *sorted(registered)))))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """Return the names; classes are looked up by the worker."""
        if isinstance(value, list):
            return value
        given = [name.strip() for name in str(value).split(",")]
        classes = [name for name in given if ":" in name]
        names = [name for name in given if name and ":" not in name]
        return (super().convert(",".join(names), param, ctx) if names or not classes else []) + classes


class Concurrencies(_ParamType):
    """Whole numbers from 1 to 256, separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Return the numbers, each once, in the order given."""
        if isinstance(value, list):
            return value
        try:
            numbers = list(dict.fromkeys(int(part) for part in str(value).split(",")))
        except ValueError:
            numbers = []
        if not numbers or not all(1 <= number <= 256 for number in numbers):
            self.fail(f"{value!r}: write one or more whole numbers from 1 to 256, such as 4 or 4,16.", param, ctx)
        return numbers


class Rates(_ParamType):
    """Tasks per second, rising, separated by commas; `auto` looks for the knee."""

    name = "rates"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the rates; none for `auto`."""
        if isinstance(value, tuple):
            return value
        if value == "auto":
            return ()
        try:
            rates = tuple(sorted({float(part) for part in str(value).split(",")}))
        except ValueError:
            rates = (0.0,)
        if not all(0 < rate <= 100_000 for rate in rates):
            self.fail(f"{value!r}: write tasks per second, such as 10,20,40, or auto.", param, ctx)
        return rates


class Seconds(_ParamType):
    """A duration, such as `1s` or `500ms`."""

    name = "duration"

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, int | float):
            return float(value)
        text, unit = str(value).strip(), 1.0
        if text.endswith("ms"):
            text, unit = text[:-2], 0.001
        elif text.endswith("s"):
            text = text[:-1]
        try:
            seconds = float(text) * unit
        except ValueError:
            seconds = -1.0
        if not self._low <= seconds <= self._high:
            self.fail(f"{value!r}: write a duration from {self._low:g}s to {self._high:g}s, such as 1s.", param, ctx)
        return seconds


class ObjectiveType(_ParamType):
    """A latency objective, such as `p95=50ms`."""

    name = "objective"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Objective:
        """Return the objective."""
        if isinstance(value, Objective):
            return value
        try:
            return Objective.parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Json(_ParamType):
    """A JSON value of one type."""

    name = "json"

    def __init__(self, wanted: type, words: str) -> None:
        self._wanted, self._words = wanted, words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value."""
        if isinstance(value, self._wanted):
            return value
        try:
            found = json.loads(value)
        except (TypeError, ValueError):
            found = None
        if not isinstance(found, self._wanted):
            self.fail(f"{value!r} is not {self._words}.", param, ctx)
        return found
