"""Command line options of Locust for Celery, checked before anything starts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from locust import events

from ..bench.arguments import suggest
from ..bench.contests import STRATEGIES
from ..patterns import OURS, PATTERNS, POOLS
from ..workloads import WORKLOADS
from .arrivals import ARRIVALS

STRATEGY_NAMES = (
    "auto",
    *dict.fromkeys((*STRATEGIES, *(point.name for point in entry_points(group="celery_alchemy.strategies")))),
)
REPLIES = ("events", "list")
OWN_ONLY = {"worker_pool": "prefork", "strategy": None, "pattern": OURS, "workload": "transfer", "concurrency": 4}
"""Options of the worker that is started here, with their defaults: with --app there is none."""
THEIRS_ONLY: dict[str, Any] = {
    "task": None,
    "args": [],
    "kwargs": {},
    "queue": "",
    "replies": REPLIES[0],
    "reply_url": None,
}


class OptionError(Exception):
    """Options that do not go together; the message is one sentence."""


def register() -> None:
    """Have Locust know the options of the locustfile, besides the thresholds."""
    hooks: Any = events
    hooks.init_command_line_parser.add_listener(_add_options)


def register_thresholds() -> None:
    """Have Locust know the thresholds, in whatever locustfile."""
    hooks: Any = events
    hooks.init_command_line_parser.add_listener(_add_thresholds)


# Locust passes the parser by this name.
def _add_thresholds(parser: Any) -> None:
    group = parser.add_argument_group("Celery thresholds", "Exit code 3 if one is not kept; each breach is named.")
    for name, metavar, text in (
        ("--fail-p95", "MS", "Most milliseconds for the 95th percentile of latency."),
        ("--fail-p99", "MS", "Most milliseconds for the 99th percentile of latency."),
        ("--fail-goodput", "N", "Fewest successful tasks per second."),
    ):
        _add(group, name, type=_positive, metavar=metavar, help=text)
    _add(group, "--fail-ratio", type=_ratio, metavar="RATIO", help="Most failures among all tasks, from 0 to 1.")


def _add_options(parser: Any) -> None:
    own = parser.add_argument_group("Celery worker to start", "With services of its own, unless URLs are given.")
    _add(own, "--worker-pool", type=_pool, default="prefork", metavar="POOL", help=f"One of {', '.join(POOLS)}.")
    _add(own, "--concurrency", type=_whole(1, 256), default=4, metavar="N", help="Pool processes, threads, greenlets.")
    _add(own, "--strategy", type=_strategy, metavar="NAME", help="Session strategy; left to the worker by default.")
    _add(own, "--pattern", type=_known("pattern", PATTERNS), default=OURS, metavar="NAME",
         help=f"How tasks get their Session: {', '.join(PATTERNS)}.")  # fmt: skip
    _add(own, "--workload", type=_known("workload", WORKLOADS), default="transfer", metavar="NAME",
         help=f"What tasks do: {', '.join(WORKLOADS)}.")  # fmt: skip
    _add(own, "--database-url", metavar="URL", env_var="DATABASE_URL",
         help="Database server to use; with --app the database whose connections are shown.")  # fmt: skip
    _add(own, "--broker-url", metavar="URL", env_var="BROKER_URL", help="Broker to use.")

    theirs = parser.add_argument_group("Your own app, and its running worker")
    _add(theirs, "--app", metavar="APP", help="As in `celery -A`, such as proj.celery:app.")
    _add(theirs, "--task", metavar="NAME", help="Task to send, such as proj.tasks.import_order.")
    _add(theirs, "--args", type=_json(list), default=[], metavar="JSON", help="Its arguments: a JSON list.")
    _add(theirs, "--kwargs", type=_json(dict), default={}, metavar="JSON", help="Its keywords: a JSON object.")
    _add(theirs, "--queue", default="", metavar="NAME", help="Queue, if not where the app routes the task.")
    _add(theirs, "--replies", type=_known("way to reply", REPLIES), default=REPLIES[0], metavar="WAY",
         help="events: Celery's, switched on for the run; list: the worker has loaded "
              "-I celery_alchemy.loadtests.reporting.")  # fmt: skip
    _add(theirs, "--reply-url", metavar="URL", help="Redis of the reply lists, if not the broker.")

    load = parser.add_argument_group("Celery load")
    _add(load, "--rate", type=_positive, metavar="N",
         help="Open model: N arrivals per second, shared by the users, whatever the worker does.")  # fmt: skip
    _add(load, "--arrival", type=_known("kind of arrival", ARRIVALS), default=ARRIVALS[0], metavar="KIND",
         help="poisson or constant.")  # fmt: skip
    _add(load, "--reply-timeout", type=_positive, default=60.0, metavar="S", help="A later answer is none.")


def check(options: Any) -> None:
    """Look for options that do not go together.

    Raises:
        OptionError: There are some.
    """
    given = vars(options)
    if options.app:
        wrong = [name for name, default in OWN_ONLY.items() if given[name] != default]
        if wrong:
            raise OptionError(
                f"{_spelled(wrong)} cannot be combined with --app: your own worker runs already, as you started it."
            )
        if not options.task:
            raise OptionError("--app needs --task: the name of the task to send, such as proj.tasks.import_order.")
        return
    wrong = [name for name, default in THEIRS_ONLY.items() if given[name] != default]
    if wrong:
        raise OptionError(f"{_spelled(wrong)} needs --app: without it, a worker with workloads of its own is started.")
    pattern = PATTERNS[options.pattern]
    if options.strategy and options.pattern != OURS:
        raise OptionError(f"--strategy is {OURS}'s: the pattern {options.pattern} has none.")
    if options.worker_pool not in pattern.pools:
        raise OptionError(
            f"The pattern {options.pattern} makes no sense with --worker-pool {options.worker_pool}: "
            f"use {' or '.join(pattern.pools)}."
        )
    if options.pattern == "flask" and find_spec("flask_sqlalchemy") is None:
        raise OptionError("The pattern flask needs Flask-SQLAlchemy: pip install Flask-SQLAlchemy.")


def _add(group: Any, name: str, *, env_var: str | None = None, **keywords: Any) -> None:
    # Passwords and names of modules are not for the web page.
    action = group.add_argument(name, **({"env_var": env_var} if env_var else {}), **keywords)
    action.include_in_web_ui = False


def _spelled(names: list[str]) -> str:
    return " and ".join("--" + name.replace("_", "-") for name in names)


def _known(what: str, known: Any) -> Callable[[str], str]:
    def convert(value: str) -> str:
        if value not in known:
            raise argparse.ArgumentTypeError(f"{value!r} is not a {what}. {suggest(value, tuple(known))}")
        return value

    return convert


def _pool(value: str) -> str:
    name = _known("worker pool", POOLS)(value)
    if name in {"gevent", "eventlet"} and find_spec(name) is None:
        raise argparse.ArgumentTypeError(f"{name} is not installed: pip install 'celery-alchemy[{name}]'.")
    return name


def _strategy(value: str) -> str:
    # A class of somebody's own is looked up by the worker.
    return value if ":" in value else _known("session strategy", STRATEGY_NAMES)(value)


def _positive(value: str) -> float:
    return _number(value, lambda number: number > 0, "a number above 0")


def _ratio(value: str) -> float:
    return _number(value, lambda number: 0 <= number <= 1, "a number from 0 to 1")


def _number(value: str, fits: Callable[[float], bool], what: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not fits(number):
        raise argparse.ArgumentTypeError(f"{value!r} is not {what}.")
    return number


def _whole(low: int, high: int) -> Callable[[str], int]:
    def convert(value: str) -> int:
        if not value.isdecimal() or not low <= int(value) <= high:
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number from {low} to {high}.")
        return int(value)

    return convert


def _json(kind: type) -> Callable[[Any], Any]:
    what = "list, such as '[1]'" if kind is list else "object, such as '{\"key\": 1}'"

    def convert(value: Any) -> Any:
        try:
            found = json.loads(value)
        except ValueError:
            found = None
        if not isinstance(found, kind):
            raise argparse.ArgumentTypeError(f"{value!r} is not a JSON {what}.")
        return found

    return convert
