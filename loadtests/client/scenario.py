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
from ..tasks.replies import redis_url
from ..tasks.workloads import WORKLOADS, Workload
from . import options
from .hub import EventReplies, ReplyHub
from .lines import LineProcess
from .run import run_of
from .serve import find_app
from .users import CeleryUser

EXIT_USAGE, EXIT_BROKEN = 2, 1
START_S, FINISH_S = 120.0, 90.0
TARGET = "celery_target"
"""Options that are no Locust options reach the Locust workers when users are spawned: this one is set on the master."""

logger: logging.Logger = logging.getLogger(__name__)


class Load(CeleryUser):
    """What the command line asks for: as many tasks in flight as there are users, or with `--rate` tasks at a rate."""

    tasks: list[Any] = [CeleryUser.run_own_task]  # noqa: RUF012 - Locust's way.
    task_name: str
    task_args: Sequence[Any]
    task_kwargs: Mapping[str, Any]
    workload: Workload | None

    def __init__(self, environment: Any) -> None:
        self.options: Any = environment.parsed_options
        chosen = self.options
        target: dict[str, str] = getattr(chosen, TARGET)
        self.broker_url: str = target.get("broker_url", "")
        self.reply_url: str = target.get("reply_url", "")
        self.queue: str = target.get("queue", chosen.queue)
        self.reply_timeout_s: float = chosen.reply_timeout
        self.rate: float | None = chosen.rate_per_user
        if chosen.app:
            self.app: Any = find_app(chosen.app)
            self.task_name, self.task_args, self.task_kwargs = chosen.task, chosen.args, chosen.kwargs
        else:
            self.workload = WORKLOADS[chosen.workload]
        super().__init__(environment)
        if rows_directory := target.get("rows_directory"):
            self.load_run.write_rows_to(rows_directory)

    def make_hub(self) -> ReplyHub:
        """Return a hub on the app of --app, or on the worker that was started."""
        if self.app is None or self.options.replies == "list":
            return super().make_hub()
        return ReplyHub(self.app, EventReplies(self.app), queue=self.queue, timeout_s=self.reply_timeout_s)


def register() -> None:
    """Have Locust know the options, and prepare what they ask for before the first user."""
    options.register(options.add_options)
    hooks: Any = events
    hooks.init.add_listener(_prepare)


def _prepare(environment: Any, **_: Any) -> None:
    chosen = environment.parsed_options
    if isinstance(environment.runner, WorkerRunner):
        return
    try:
        options.check(chosen)
        helper = LineProcess("The process with the worker", "-m", "celery_alchemy.loadtests.client.serve")
        environment.events.quit.add_listener(lambda **_: helper.stop())
        ready = _start(helper, chosen)
    except LoadTestError as error:
        sys.stderr.write(f"locust: error: {error}\n")
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    setattr(chosen, TARGET, ready)
    for line in ready["described"]:
        logger.info(line)
    environment.events.test_start.add_listener(lambda **_: _share_rate(environment))
    environment.events.quitting.add_listener(lambda **_: _verdict(environment, helper))


def _start(helper: LineProcess, chosen: Any) -> dict[str, Any]:
    """Have the helper start what is asked for, and return where it is; stop the helper if it cannot."""
    names = ("workload", "worker_pool", "concurrency", "strategy", "pattern", "broker_url")
    wanted: dict[str, Any] = {name: getattr(chosen, name) for name in names}
    where: dict[str, Any] = {}
    try:
        if chosen.app:
            wanted = {"app": chosen.app, "task": chosen.task, "events": chosen.replies == "events"}
        if chosen.app and chosen.replies == "list":
            where["reply_url"] = chosen.reply_url or redis_url(find_app(chosen.app).conf.broker_write_url or "")
            if not where["reply_url"]:
                message = "--replies list needs --reply-url: the broker of --app is neither Redis nor Valkey."
                raise LoadTestError(message)
        return helper.ask(START_S, start={**wanted, "database_url": chosen.database_url}) | where
    except BaseException:
        helper.stop()
        raise


def _share_rate(environment: Any) -> None:
    """Divide the rate among the users."""
    chosen = environment.parsed_options
    chosen.rate_per_user = chosen.rate and chosen.rate / max(1, environment.runner.target_user_count)


def _verdict(environment: Any, helper: LineProcess) -> None:
    """Let the helper check what the run left, once nothing is in flight."""
    run = run_of(environment)
    environment.runner.stop()
    run.close()
    try:
        end = helper.ask(FINISH_S, finish={"tasks": run.tasks})
    except LoadTestError as error:
        end = {"lines": [f"BROKEN the worker could not be checked: {error}"], "right": False}
    helper.stop()
    run.conclusions += end["lines"]
    if not end["right"]:
        environment.process_exit_code = EXIT_BROKEN
