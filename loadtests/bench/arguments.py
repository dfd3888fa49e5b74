"""What the commands of the benchmark and of Locust accept, checked before anything starts.

Each function takes what was written and returns its value, or raises ValueError with a sentence.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from ..tasks.patterns import ASYNCIO, OURS, PATTERNS, POOLS
from ..tasks.workloads import WORKLOADS

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    # Generic only since click 8.4.
    _ParamType = click.ParamType

AUTO, GREEN = "auto", ("gevent", "eventlet")


class Value(_ParamType):
    """The type of an option whose text one of these functions takes."""

    name: str
    parse: Callable[[str], Any]

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value; a default can be a value already."""
        try:
            return self.parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


def for_argparse(kind: _ParamType, value: str) -> Any:
    """Take a value for argparse, which shows no message but that of an ArgumentTypeError."""
    try:
        return kind.convert(value, None, None)
    except click.BadParameter as error:
        raise argparse.ArgumentTypeError(error.message) from None


def suggest(value: str, known: Sequence[str]) -> str:
    """Return the nearest known spelling, and all of them."""
    near = difflib.get_close_matches(value, known, n=1)
    return (f"Did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(known)}."


_PACKAGES = {
    "flask": "Flask-SQLAlchemy", "taskiq": "taskiq-redis", "celery_aio_pool": "celery-aio-pool",
    **{green: green for green in GREEN},
}  # fmt: skip


def missing(name: str) -> str:
    """Return what a worker pool or a pattern needs and is not installed, in a sentence; empty if it can be used."""
    package = _PACKAGES.get(name)
    installed = package is None or find_spec(package.lower().replace("-", "_"))
    return "" if installed else f"{name} needs {package}: pip install {package}."


class OneOf(Value):
    """One of the known names, if what it needs is installed."""

    what: str
    known: tuple[str, ...]
    path: bool

    def __init__(self, what: str, known: Collection[str], *, path: bool = False) -> None:
        """Know the names.

        Args:
            path: Whether `package.module:Class`, which the worker looks up, will do too.
        """
        super().__init__("name", self.take)
        self.what, self.known, self.path = what, tuple(known), path

    def take(self, value: str) -> str:
        """Return the name."""
        if value not in self.known and not (self.path and ":" in value):
            raise ValueError(f"{value!r} is not a {self.what}. {suggest(value, self.known)}")
        if wrong := missing(value):
            raise ValueError(wrong)
        return value

    def several(self, value: str, *, none: bool = False) -> list[str]:
        """Return names that are separated by commas, each once; of `all` those that are installed; of `none` none."""
        names = list(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
        if names == ["none"] and none:
            return []
        if not names:
            raise ValueError(f"{value!r} names no {self.what}. Known: {', '.join(self.known)}.")
        everything = [name for name in self.known if not missing(name)]
        return everything if names == ["all"] else [self.take(name) for name in names]


def numbers(low: float, high: float, kind: type, message: str, value: str) -> tuple[Any, ...]:
    """Take numbers separated by commas, each once, in the order given."""
    try:
        found = tuple(dict.fromkeys(kind(part) for part in value.split(",")))
    except ValueError:
        found = ()
    if not found or not all(low <= number <= high for number in found):
        raise ValueError(f"{value!r}: {message}")
    return found


def seconds(low: float, high: float, value: str) -> float:
    """Take a duration, such as `1s` or `500ms`."""
    text, unit = (value[:-2], 0.001) if value.endswith("ms") else (value.removesuffix("s"), 1.0)
    try:
        found = float(text) * unit
    except ValueError:
        found = -1.0
    if not low <= found <= high:
        raise ValueError(f"{value!r}: write a duration from {low:g}s to {high:g}s, such as 1s.")
    return found


def json_of(kind: type, value: str) -> Any:
    """Take a JSON list or object."""
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, kind):
        what = "list, such as '[1]'" if kind is list else "object, such as '{\"key\": 1}'"
        raise ValueError(f"{value!r} is not a JSON {what}.")
    return found


def option(name: str, default: Any, parse: Callable[[str], Any], text: str, kind: str = "names") -> Any:
    """Return a click option whose text a function takes."""
    return click.option(*name.split(), default=default, type=Value(kind, parse), show_default=True, help=text)


DATABASE_URL = click.option(
    "--database-url",
    envvar="DATABASE_URL",
    help="Server, or durable, durable+1ms and the like for one of the run's own.",
)
BROKER_URL = click.option("--broker-url", envvar="BROKER_URL", help="Broker; default: an embedded Valkey.")
REGISTERED = sorted(point.name for point in entry_points(group="celery_alchemy.strategies"))
POOL = OneOf("worker pool", (*POOLS, ASYNCIO))
STRATEGY = OneOf("session strategy", (AUTO, *dict.fromkeys(("local", "scoped", "per_process", *REGISTERED))), path=True)
PATTERN = OneOf("pattern", PATTERNS)
BASELINE = OneOf("pattern to compare with", [name for name in PATTERNS if name != OURS])
WORKLOAD = OneOf("workload", WORKLOADS)
