"""Command line options of Locust for Celery, checked before anything starts."""

from __future__ import annotations

from functools import partial
from typing import Any

import click
from locust import events

from ..bench import arguments
from ..bench.arguments import OneOf, Value, for_argparse, json_of
from ..errors import LoadTestError
from ..tasks.patterns import OURS, PATTERNS, POOLS
from ..tasks.workloads import WORKLOADS

REPLIES = ("events", "list")
POSITIVE, RATIO, SLOTS = click.FloatRange(min=0, min_open=True), click.FloatRange(0, 1), click.IntRange(1, 256)
WAY = OneOf("way to reply", REPLIES)
TEXT = click.STRING

# By the name of the attribute: what an option takes, its default, and its help. One line each, to be read as a table.
# fmt: off
THRESHOLDS: dict[str, tuple[Any, Any, str]] = {
    "fail_p95": (POSITIVE, None, "Most milliseconds for the 95th percentile of latency."),
    "fail_p99": (POSITIVE, None, "Most milliseconds for the 99th percentile of latency."),
    "fail_goodput": (POSITIVE, None, "Fewest successful tasks per second."),
    "fail_ratio": (RATIO, None, "Most failures among all tasks, from 0 to 1."),
}
OWN: dict[str, tuple[Any, Any, str]] = {
    "worker_pool": (arguments.POOL, "prefork", f"One of {', '.join(POOLS)}."),
    "concurrency": (SLOTS, 4, "Pool processes, threads, greenlets."),
    "strategy": (arguments.STRATEGY, None, "Session strategy; left to the worker by default."),
    "pattern": (arguments.PATTERN, OURS, f"How tasks get their Session: {', '.join(PATTERNS)}."),
    "workload": (arguments.WORKLOAD, "transfer", f"What tasks do: {', '.join(WORKLOADS)}."),
}
SERVICES: dict[str, tuple[Any, Any, str]] = {
    "database_url": (TEXT, None, "Database server to use; with --app the database whose connections are shown."),
    "broker_url": (TEXT, None, "Broker to use."),
}
THEIRS: dict[str, tuple[Any, Any, str]] = {
    "app": (TEXT, None, "As in `celery -A`, such as proj.celery:app."),
    "task": (TEXT, None, "Task to send, such as proj.tasks.import_order."),
    "args": (Value("JSON", partial(json_of, list)), [], "Its arguments: a JSON list."),
    "kwargs": (Value("JSON", partial(json_of, dict)), {}, "Its keywords: a JSON object."),
    "queue": (TEXT, "", "Queue, if not where the app routes the task."),
    "replies": (WAY, REPLIES[0], "events: Celery's, switched on for the run; list: the worker has loaded -I "
                "celery_alchemy.loadtests.reporting."),
    "reply_url": (TEXT, None, "Redis of the reply lists, if not the broker."),
}
LOAD: dict[str, tuple[Any, Any, str]] = {
    "rate": (POSITIVE, None, "Open model: N arrivals per second, shared by the users, whatever the worker does."),
    "reply_timeout": (POSITIVE, 60.0, "Seconds; a later answer is none."),
}
# fmt: on


def register(add: Any) -> None:
    """Have Locust know the options that `add` adds to a parser."""
    hooks: Any = events
    hooks.init_command_line_parser.add_listener(add)


# Locust passes the parser by this name.
def add_thresholds(parser: Any) -> None:
    """Add what any locustfile with a CeleryUser has."""
    _add(parser, "Celery thresholds", "Exit code 3 if one is not kept; each breach is named.", THRESHOLDS)


def add_options(parser: Any) -> None:
    """Add what `loadtests/locustfile.py` has besides."""
    _add(parser, "Celery worker to start", "With services of its own, unless URLs are given.", OWN)
    _add(parser, "Services", "", SERVICES)
    _add(parser, "Your own app, and its running worker", "", THEIRS)
    _add(parser, "Celery load", "", LOAD)


def _add(parser: Any, title: str, text: str, options: dict[str, tuple[Any, Any, str]]) -> None:
    group = parser.add_argument_group(title, text)
    for name, (kind, default, said) in options.items():
        keywords = {"env_var": name.upper()} if options is SERVICES else {}
        action = group.add_argument(
            _spelled(name), type=partial(for_argparse, kind), default=default, metavar=name.rpartition("_")[2].upper(),
            help=said, **keywords,
        )  # fmt: skip
        # Passwords and names of modules are not for the web page.
        action.include_in_web_ui = False


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")


def check(options: Any) -> None:
    """Look for options that do not go together.

    Raises:
        LoadTestError: There are some.
    """
    of_others = OWN if options.app else THEIRS
    wrong = [_spelled(name) for name, (_, default, _) in of_others.items() if getattr(options, name) != default]
    spelled, pattern = " and ".join(wrong), PATTERNS[options.pattern]
    if options.app and wrong:
        raise LoadTestError(
            f"{spelled} cannot be combined with --app: your own worker runs already, as you started it."
        )
    if options.app and not options.task:
        raise LoadTestError("--app needs --task: the name of the task to send, such as proj.tasks.import_order.")
    if wrong:
        raise LoadTestError(f"{spelled} needs --app: without it, a worker with workloads of its own is started.")
    if options.strategy and options.pattern != OURS:
        raise LoadTestError(f"--strategy is {OURS}'s: the pattern {options.pattern} has none.")
    if options.worker_pool not in pattern.pools:
        raise LoadTestError(
            f"The pattern {options.pattern} makes no sense with --worker-pool {options.worker_pool}: "
            f"use {' or '.join(pattern.pools)}."
        )
