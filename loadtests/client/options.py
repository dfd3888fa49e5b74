"""Command line options of Locust for Celery, checked before anything starts."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from locust import events

from ..bench import arguments
from ..bench.arguments import json_of, number, one_of
from ..tasks.patterns import OURS, PATTERNS, POOLS
from ..tasks.workloads import WORKLOADS
from .hub import ARRIVALS

REPLIES = ("events", "list")
OWN_ONLY: dict[str, Any] = {
    "worker_pool": "prefork",
    "strategy": None,
    "pattern": OURS,
    "workload": "transfer",
    "concurrency": 4,
}
"""Options of the worker that is started here, with their defaults: with --app there is none."""
THEIRS_ONLY: dict[str, Any] = {
    "task": None,
    "args": [],
    "kwargs": {},
    "queue": "",
    "replies": REPLIES[0],
    "reply_url": None,
}

positive: partial[Any] = partial(number, 1e-9, math.inf, float, "a number above 0")
ratio: partial[Any] = partial(number, 0, 1, float, "a number from 0 to 1")
concurrency: partial[Any] = partial(number, 1, 256, int, "a whole number from 1 to 256")


class OptionError(Exception):
    """Options that do not go together; the message is one sentence."""


def register(add: Any) -> None:
    """Have Locust know the options that `add` adds to a parser."""
    hooks: Any = events
    hooks.init_command_line_parser.add_listener(add)


# Locust passes the parser by this name.
def add_thresholds(parser: Any) -> None:
    """Add what any locustfile with a CeleryUser has."""
    group = parser.add_argument_group("Celery thresholds", "Exit code 3 if one is not kept; each breach is named.")
    _add(group, "--fail-p95", "MS", "Most milliseconds for the 95th percentile of latency.", positive)
    _add(group, "--fail-p99", "MS", "Most milliseconds for the 99th percentile of latency.", positive)
    _add(group, "--fail-goodput", "N", "Fewest successful tasks per second.", positive)
    _add(group, "--fail-ratio", "RATIO", "Most failures among all tasks, from 0 to 1.", ratio)


def add_options(parser: Any) -> None:
    """Add what `loadtests/locustfile.py` has besides."""
    own = parser.add_argument_group("Celery worker to start", "With services of its own, unless URLs are given.")
    _add(own, "--worker-pool", "POOL", f"One of {', '.join(POOLS)}.", arguments.pool, "prefork")
    _add(own, "--concurrency", "N", "Pool processes, threads, greenlets.", concurrency, 4)
    _add(own, "--strategy", "NAME", "Session strategy; left to the worker by default.", arguments.strategy)
    _add(own, "--pattern", "NAME", f"How tasks get their Session: {', '.join(PATTERNS)}.", arguments.pattern, OURS)
    _add(own, "--workload", "NAME", f"What tasks do: {', '.join(WORKLOADS)}.", arguments.workload, "transfer")
    _add(own, "--database-url", "URL", "Database server to use; with --app the database whose connections are shown.",
         env_var="DATABASE_URL")  # fmt: skip
    _add(own, "--broker-url", "URL", "Broker to use.", env_var="BROKER_URL")

    theirs = parser.add_argument_group("Your own app, and its running worker")
    _add(theirs, "--app", "APP", "As in `celery -A`, such as proj.celery:app.")
    _add(theirs, "--task", "NAME", "Task to send, such as proj.tasks.import_order.")
    _add(theirs, "--args", "JSON", "Its arguments: a JSON list.", partial(json_of, list), [])
    _add(theirs, "--kwargs", "JSON", "Its keywords: a JSON object.", partial(json_of, dict), {})
    _add(theirs, "--queue", "NAME", "Queue, if not where the app routes the task.", default="")
    _add(theirs, "--replies", "WAY", "events: Celery's, switched on for the run; list: the worker has loaded -I "
         "celery_alchemy.loadtests.reporting.", partial(one_of, "way to reply", REPLIES), REPLIES[0])  # fmt: skip
    _add(theirs, "--reply-url", "URL", "Redis of the reply lists, if not the broker.")

    load = parser.add_argument_group("Celery load")
    _add(load, "--rate", "N", "Open model: N arrivals per second, shared by the users, whatever the worker does.",
         positive)  # fmt: skip
    _add(load, "--arrival", "KIND", "poisson or constant.", partial(one_of, "kind of arrival", ARRIVALS), ARRIVALS[0])
    _add(load, "--reply-timeout", "S", "A later answer is none.", positive, 60.0)


def check(options: Any) -> None:
    """Look for options that do not go together.

    Raises:
        OptionError: There are some.
    """
    wrong = [name for name, default in (OWN_ONLY if options.app else THEIRS_ONLY).items()
             if getattr(options, name) != default]  # fmt: skip
    spelled = " and ".join("--" + name.replace("_", "-") for name in wrong)
    if options.app:
        if wrong:
            raise OptionError(
                f"{spelled} cannot be combined with --app: your own worker runs already, as you started it."
            )
        if not options.task:
            raise OptionError("--app needs --task: the name of the task to send, such as proj.tasks.import_order.")
        return
    if wrong:
        raise OptionError(f"{spelled} needs --app: without it, a worker with workloads of its own is started.")
    pattern = PATTERNS[options.pattern]
    if options.strategy and options.pattern != OURS:
        raise OptionError(f"--strategy is {OURS}'s: the pattern {options.pattern} has none.")
    if options.worker_pool not in pattern.pools:
        raise OptionError(
            f"The pattern {options.pattern} makes no sense with --worker-pool {options.worker_pool}: "
            f"use {' or '.join(pattern.pools)}."
        )


def _add(
    group: Any, name: str, metavar: str, text: str, parse: arguments.Parse = str, default: Any = None, **keywords: Any
) -> None:
    action = group.add_argument(
        name, type=partial(arguments.for_argparse, parse), default=default, metavar=metavar, help=text, **keywords
    )
    # Passwords and names of modules are not for the web page.
    action.include_in_web_ui = False
