"""Start a real `celery worker`, wait until it consumes, and end it in bounded time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import WorkerError
from ..reporting import user_environ
from ..tasks.patterns import PATTERNS
from ..tasks.replies import ReplyList
from .environment import WorkerEnvironment
from .guard import with_package
from .processes import ChildProcess, StopStep, child_process
from .rundir import RunDirectory

OWN_APP = "celery_alchemy.loadtests.tasks.app"
REPORTING = "celery_alchemy.loadtests.reporting"
START_S = 45.0
# Warm shutdown finishes the running tasks; cold shutdown drops them. A worker with a broken session can ignore both.
STOP_STEPS = (StopStep(signal.SIGTERM, 15.0), StopStep(signal.SIGQUIT, 5.0))


@dataclass(frozen=True, slots=True)
class ReadyMessage:
    """What a worker says of itself once it consumes."""

    pid: int
    strategy: str  # Name of the session strategy in force
    reason: str  # Why that one
    max_connections: int | None
    """The most connections it announces to open, all its pool processes together; None if it knows no bound."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker that is ready."""

    process: ChildProcess
    ready: ReadyMessage
    start_s: float  # Seconds from the start of the process until it was ready

    @property
    def alive(self) -> bool:
        """Whether the main process still runs."""
        return self.process.exit_code is None


@contextmanager
def running_worker(
    run: RunDirectory, environment: WorkerEnvironment, *, pool: str, concurrency: int, strategy: str | None = None,
    name: str = "", app: str = OWN_APP, app_environ: Mapping[str, str] | None = None,
    start_timeout_s: float = START_S, stop_steps: Sequence[StopStep] = STOP_STEPS,
) -> Iterator[Worker]:  # fmt: skip
    """Start a worker, yield it when it is ready, stop it when the block ends.

    Args:
        pool: Worker pool, as in `celery worker --pool`.
        concurrency: Pool processes, threads or greenlets; solo ignores it.
        strategy: Session strategy to insist on; None leaves the choice to the worker.
        name: Of this worker among those of the run; the worker pool's by default.
        app: As in `celery -A`; another one than ours is told to load `reporting`, and to consume our queue.
        app_environ: What another app than ours needs besides the present environment.
    Raises:
        WorkerError: It ended, or was not ready in time.
    """
    name = name or pool
    arguments = [f"--pool={pool}", f"--concurrency={concurrency}"]
    arguments += [f"--session-strategy={strategy}"] if strategy else []
    arguments += [f"--include={REPORTING}", f"--queues={environment.queue}"] if app != OWN_APP else []
    command = worker_command(app, *arguments, hostname=f"{name}@%h")
    if app == OWN_APP and (theirs := PATTERNS[environment.pattern].worker):
        command = [sys.executable, *theirs, str(concurrency)]
    if app == OWN_APP:
        # The caller's own settings must not change what is measured.
        own = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY", "LOADTEST"))}
        environ = {**own, **environment.to_environ()}
    else:
        told = user_environ(environment.reply_url, environment.ready_key)
        environ = {**os.environ, **(app_environ or {}), **told}
    # What a worker that is killed leaves behind is removed with the run.
    environ = with_package({**environ, "TMPDIR": str(run.path)})
    started = time.monotonic()
    # Celery looks for modules in the directory it runs in: a strategy of the caller's own is found there.
    with child_process(run, f"worker-{name}", command, environ=environ, steps=stop_steps, cwd=Path.cwd()) as process:
        with contextlib.closing(ReplyList(environment.reply_url, environment.ready_key)) as announcements:
            message, *_ = process.when_ready(
                lambda: list(announcements.pop(timeout_s=0.25)), f"The {pool} worker", start_timeout_s, WorkerError
            )
        yield Worker(process, ReadyMessage(**json.loads(message)), time.monotonic() - started)


def worker_command(app: str, *arguments: str, hostname: str, loglevel: str = "INFO") -> list[str]:
    """Return the command of a worker that talks to no other worker.

    Args:
        arguments: The worker pool among them, as `--pool=...`: Celery patches for gevent and eventlet only where it
            recognises the option.
    """
    return [
        *(sys.executable, "-m", "celery", "-A", app, "worker", *arguments),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        *(f"--hostname={hostname}", f"--loglevel={loglevel}"),
    ]
