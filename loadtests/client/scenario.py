"""What `locustfile.py` runs: a workload on a worker that is started for it, or a task of the user's own worker."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any

from locust import events
from locust.runners import WorkerRunner

from ..errors import LoadTestError
from ..replies import redis_url
from ..their_workers import find_app
from ..workloads import WORKLOADS
from . import options
from .event_replies import EventReplies
from .helper import Helper
from .hub import ReplyHub, Target
from .runs import run_of
from .thresholds import EXIT_BROKEN
from .users import ArrivalUser, CeleryUser
from .web import add_sessions_tab

EXIT_USAGE = 2
TARGET = "celery_target"
"""Options that are no Locust options reach the Locust workers when users are spawned: this one is set on the master."""

logger = logging.getLogger(__name__)


class _Scenario(CeleryUser):
    """What the command line asks for."""

    abstract = True

    def __init__(self, environment: Any) -> None:
        chosen = environment.parsed_options
        self.options, self.target = chosen, getattr(chosen, TARGET)
        self.reply_timeout_s = chosen.reply_timeout
        if chosen.app:
            self.task_name, self.task_args, self.task_kwargs = chosen.task, chosen.args, chosen.kwargs
        else:
            self.workload = WORKLOADS[chosen.workload]
        super().__init__(environment)
        if rows_directory := self.target.get("rows_directory"):
            self.load_run.write_rows_to(rows_directory)

    def make_hub(self) -> ReplyHub:
        """Return a hub on the app of --app, or on the worker that was started."""
        chosen = self.options
        if not chosen.app:
            target = Target(self.target["broker_url"], self.target["queue"], self.target["reply_url"])
            return ReplyHub(target, timeout_s=self.reply_timeout_s)
        app = find_app(chosen.app)
        replies = EventReplies(app) if chosen.replies == "events" else None
        target = Target("", chosen.queue, "" if replies else reply_url_of(app, chosen.reply_url))
        return ReplyHub(target, app=app, replies=replies, timeout_s=self.reply_timeout_s)


class ClosedLoad(_Scenario):
    """As many tasks in flight as there are users."""

    tasks = [CeleryUser.run_own_task]  # noqa: RUF012 - Locust's way.


class Arrivals(_Scenario, ArrivalUser):
    """Tasks at a rate, with `--rate`."""

    tasks = [CeleryUser.run_own_task]  # noqa: RUF012 - Locust's way.

    def __init__(self, environment: Any) -> None:
        chosen = environment.parsed_options
        self.rate, self.arrival = chosen.rate_per_user, chosen.arrival
        super().__init__(environment)


def reply_url_of(app: Any, given: str | None) -> str:
    """Return the redis-py URL of the server with the reply lists.

    Raises:
        LoadTestError: The broker is neither Redis nor Valkey, and nothing else was given.
    """
    found = given or redis_url(app.conf.broker_write_url or "")
    if not found:
        raise LoadTestError("--replies list needs --reply-url: the broker of --app is neither Redis nor Valkey.")
    return found


def register() -> None:
    """Have Locust know the options, and prepare what they ask for before the first user."""
    options.register()
    hooks: Any = events
    hooks.init.add_listener(_prepare)


def _prepare(environment: Any, web_ui: Any, **_: Any) -> None:
    chosen, run = environment.parsed_options, run_of(environment)
    wanted = Arrivals if chosen.rate else ClosedLoad
    environment.user_classes = [
        kind for kind in environment.user_classes if kind is wanted or kind not in {Arrivals, ClosedLoad}
    ]
    if isinstance(environment.runner, WorkerRunner):
        return
    try:
        options.check(chosen)
        helper = Helper(_wanted(chosen))
        if chosen.app and chosen.replies == "list":
            reply_url_of(find_app(chosen.app), chosen.reply_url)
    except (options.OptionError, LoadTestError) as error:
        sys.stderr.write(f"locust: error: {error}\n")
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    setattr(chosen, TARGET, {} if chosen.app else helper.ready)
    for line in _described(chosen, helper.ready):
        logger.info(line)
    environment.events.test_start.add_listener(lambda **_: _share_rate(environment))
    environment.events.quitting.add_listener(lambda **_: _verdict(environment, helper, run))
    if web_ui:
        add_sessions_tab(web_ui, run, helper)


def _wanted(chosen: Any) -> dict[str, Any]:
    """Return what the helper is asked for."""
    if chosen.app:
        return {
            "app": chosen.app,
            "task": chosen.task,
            "events": chosen.replies == "events",
            "database_url": chosen.database_url,
        }
    return {
        "workload": chosen.workload,
        "pool": chosen.worker_pool,
        "concurrency": chosen.concurrency,
        "strategy": chosen.strategy,
        "pattern": chosen.pattern,
        "database_url": chosen.database_url,
        "broker_url": chosen.broker_url,
    }


def _described(chosen: Any, ready: dict[str, Any]) -> list[str]:
    if chosen.app:
        enabled = ready["events_enabled"]
        switched = f" Task events were switched on for this run: {', '.join(enabled)}." if enabled else ""
        return [f"Sending {chosen.task} to the running worker of {chosen.app}.{switched}"]
    strategy = f", strategy {ready['strategy']} ({ready['reason']})" if ready["strategy"] else ""
    return [
        ", ".join(ready["services"]),
        f"Worker {ready['worker_pid']}: {chosen.worker_pool}, concurrency {chosen.concurrency}, "
        f"pattern {chosen.pattern}{strategy}; workload {chosen.workload}",
    ]


def _share_rate(environment: Any) -> None:
    """Divide the rate among the users."""
    chosen = environment.parsed_options
    if chosen.rate:
        chosen.rate_per_user = chosen.rate / max(1, environment.runner.target_user_count)


def _verdict(environment: Any, helper: Helper, run: Any) -> None:
    """Let the helper check what the run left, once nothing is in flight."""
    environment.runner.stop()
    run.close()
    try:
        verdicts = helper.finish(run.tasks)
    except LoadTestError as error:
        verdicts = [{"name": "the worker could be checked", "passed": False, "detail": str(error)}]
    for verdict in verdicts:
        shown = f": {verdict['detail']}" if verdict["detail"] else ""
        run.conclusions.append(f"{'ok    ' if verdict['passed'] else 'BROKEN'} {verdict['name']}{shown}")
    if any(not verdict["passed"] for verdict in verdicts):
        environment.process_exit_code = EXIT_BROKEN
    sample = helper.sample
    if "peak_connections" in sample:
        promised = sample.get("promised_connections")
        bound = f" of {promised} promised" if promised is not None else ""
        run.conclusions.insert(0, f"Connections: {sample['peak_connections']} at most{bound}.")
