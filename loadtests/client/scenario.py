"""What `locustfile.py` runs: a workload on a worker that is started for it, or a task of the user's own worker."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from locust import events
from locust.runners import WorkerRunner

from ..errors import LoadTestError
from ..services.their_workers import find_app
from ..tasks.replies import redis_url
from ..tasks.workloads import WORKLOADS, Workload
from . import options
from .event_replies import EventReplies
from .hub import ListReplies, ReplyHub
from .lines import LineProcess
from .run import Run, run_of
from .users import ArrivalUser, CeleryUser
from .web import add_sessions_tab

EXIT_USAGE, EXIT_BROKEN = 2, 1
START_S, FINISH_S = 120.0, 90.0
TARGET = "celery_target"
"""Options that are no Locust options reach the Locust workers when users are spawned: this one is set on the master."""

logger: logging.Logger = logging.getLogger(__name__)


class _Scenario(CeleryUser):
    """What the command line asks for."""

    options: Any
    target: Any
    task_args: Sequence[Any]
    task_kwargs: Mapping[str, Any]
    task_name: str

    abstract = True

    def __init__(self, environment: Any) -> None:
        chosen = environment.parsed_options
        self.options, self.target = chosen, getattr(chosen, TARGET)
        self.reply_timeout_s: float = chosen.reply_timeout
        if chosen.app:
            self.task_name, self.task_args, self.task_kwargs = chosen.task, chosen.args, chosen.kwargs
        else:
            self.workload: Workload = WORKLOADS[chosen.workload]
        super().__init__(environment)
        if rows_directory := self.target.get("rows_directory"):
            self.load_run.write_rows_to(rows_directory)

    def make_hub(self) -> ReplyHub:
        """Return a hub on the app of --app, or on the worker that was started."""
        chosen, target = self.options, self.target
        if not chosen.app:
            return ReplyHub.on(target["broker_url"], target["queue"], target["reply_url"], self.reply_timeout_s)
        app = find_app(chosen.app)
        replies = (
            EventReplies(app) if chosen.replies == "events" else ListReplies(_reply_url(app, chosen), chosen.queue)
        )
        return ReplyHub(app, replies, queue=chosen.queue, timeout_s=self.reply_timeout_s)


class ClosedLoad(_Scenario):
    """As many tasks in flight as there are users."""

    tasks: list[Any] = [CeleryUser.run_own_task]  # noqa: RUF012 - Locust's way.


class Arrivals(_Scenario, ArrivalUser):
    """Tasks at a rate, with `--rate`."""

    arrival: str
    rate: float

    tasks: list[Any] = [CeleryUser.run_own_task]  # noqa: RUF012 - Locust's way.

    def __init__(self, environment: Any) -> None:
        chosen = environment.parsed_options
        self.rate, self.arrival = chosen.rate_per_user, chosen.arrival
        super().__init__(environment)


def _reply_url(app: Any, chosen: Any) -> str:
    """Return the redis-py URL of the server with the reply lists.

    Raises:
        LoadTestError: The broker is neither Redis nor Valkey, and nothing else was given.
    """
    found = chosen.reply_url or redis_url(app.conf.broker_write_url or "")
    if not found:
        raise LoadTestError("--replies list needs --reply-url: the broker of --app is neither Redis nor Valkey.")
    return str(found)


def register() -> None:
    """Have Locust know the options, and prepare what they ask for before the first user."""
    options.register(options.add_options)
    hooks: Any = events
    hooks.init.add_listener(_prepare)


def _prepare(environment: Any, web_ui: Any, **_: Any) -> None:
    chosen, run = environment.parsed_options, run_of(environment)
    unwanted = ClosedLoad if chosen.rate else Arrivals
    environment.user_classes = [kind for kind in environment.user_classes if kind is not unwanted]
    if isinstance(environment.runner, WorkerRunner):
        return
    try:
        options.check(chosen)
        helper = LineProcess("The process with the worker", "celery_alchemy.loadtests.client.serve")
        environment.events.quit.add_listener(lambda **_: helper.stop())
        ready = _start(helper, chosen)
    except (options.OptionError, LoadTestError) as error:
        sys.stderr.write(f"locust: error: {error}\n")
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    setattr(chosen, TARGET, {} if chosen.app else ready)
    for line in ready["described"]:
        logger.info(line)
    environment.events.test_start.add_listener(lambda **_: _share_rate(environment))
    environment.events.quitting.add_listener(lambda **_: _verdict(environment, helper, run))
    if web_ui:
        add_sessions_tab(web_ui, environment.stats, helper)


def _start(helper: LineProcess, chosen: Any) -> dict[str, Any]:
    """Have the helper start what is asked for; stop it if it cannot."""
    names = ("workload", "worker_pool", "concurrency", "strategy", "pattern", "broker_url")
    wanted: dict[str, Any] = {name: getattr(chosen, name) for name in names}
    if chosen.app:
        wanted = {"app": chosen.app, "task": chosen.task, "events": chosen.replies == "events"}
    try:
        if chosen.app and chosen.replies == "list":
            _reply_url(find_app(chosen.app), chosen)
        return helper.ask(START_S, start={**wanted, "database_url": chosen.database_url})
    except BaseException:
        helper.stop()
        raise


def _share_rate(environment: Any) -> None:
    """Divide the rate among the users."""
    chosen = environment.parsed_options
    if chosen.rate:
        chosen.rate_per_user = chosen.rate / max(1, environment.runner.target_user_count)


def _verdict(environment: Any, helper: LineProcess, run: Run) -> None:
    """Let the helper check what the run left, once nothing is in flight."""
    environment.runner.stop()
    run.close()
    try:
        end = helper.ask(FINISH_S, finish={"tasks": run.tasks})
    except LoadTestError as error:
        end = {"sample": {}, "verdicts": [["the worker could be checked", False, str(error)]]}
    helper.stop()
    for name, passed, detail in end["verdicts"]:
        run.conclusions.append(f"{'ok    ' if passed else 'BROKEN'} {name}{': ' if detail else ''}{detail}")
    if not all(passed for _, passed, _ in end["verdicts"]):
        environment.process_exit_code = EXIT_BROKEN
    if peak := end["sample"].get("Connections, at most"):
        promised = end["sample"].get("Connections, promised")
        bound = f" of {promised} promised" if promised is not None else ""
        run.conclusions.insert(0, f"Connections: {peak} at most{bound}.")
