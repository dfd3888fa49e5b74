"""The worker pool `asyncio`: up to `concurrency` task requests at a time on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from celery.concurrency.base import BasePool
from celery.worker import state
from sqlalchemy.util import greenlet_spawn

from .. import _celery, apps
from ..errors import ConfigurationError
from . import identity, offloading
from .executor import DaemonExecutor
from .hub import HubThread
from .job import Job
from .loop import END_S, WorkerLoop
from .reports import Report
from .starter import Starter
from .tasks import Way, prepare
from .threads import Threads
from .watchdog import Watchdog

logger: logging.Logger = logging.getLogger(__name__)

KILL_S = 5.0
"""Seconds in which killed tasks may clean up when the worker is told to end at once."""
RESULTS, REQUESTS = 8, 4
"""Threads that store results, and that tell requests of failures, where none is stuck."""
TO_THREAD = 32
"""Threads of `asyncio.to_thread`, where fewer tasks run."""
BLOCKED_SETTING, BLOCKED_S = "alchemy_warn_blocked_s", 1.0


class TaskPool(BasePool):  # type: ignore[misc]
    """`celery worker --pool=asyncio --concurrency=200`: runs `async def` tasks on one event loop, `def` tasks in
    threads.

    Each takes a slot. What has none yet waits here, not acknowledged, and goes back to the broker when the worker ends.
    """

    body_can_be_buffer = True
    signal_safe = False
    is_green = False
    acknowledges_elsewhere: bool = False
    limit: int
    executor: DaemonExecutor
    bodies: Threads
    results: Threads
    requests: Threads
    messages: Threads
    starter: Starter

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        refuse_options(self.options)
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        self._kept: set[asyncio.Task[Any]] = set()
        self._incoming: deque[Job] = deque()
        self._told = False
        self._closing = False
        self._gave_up = False
        self._idle = threading.Event()
        self._ways: dict[str, Way] = {}
        self._offloads: offloading.Offloads | None = None
        self._hub: HubThread | None = None
        self._thread: WorkerLoop | None = None
        self._watchdog: Watchdog | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the tasks."""
        assert self._thread is not None
        return self._thread.loop

    # -- start --------------------------------------------------------------------------------------------------------

    def on_start(self) -> None:
        _celery.identify_by(identity.who)
        for name in list(self.app.tasks):
            self._way_of(name)
        self.starter = Starter()
        self._thread = WorkerLoop(self._begin, self._dispose)
        self._thread.begin()
        ways = [way for name, way in self._ways.items() if not name.startswith("celery.")]
        counts = [ways.count(one) for one in Way]
        logger.info(
            "asyncio worker pool in pid %s: %s tasks at a time; of the tasks known, %s",
            os.getpid(), self.limit, "; ".join(f"{n} {one.value}" for n, one in zip(counts, Way, strict=True) if n),
        )  # fmt: skip

        self._tell_of_limits()

    def _tell_of_limits(self) -> None:
        """Say which tasks have time limits that nothing can keep."""
        names = [name for name, way in self._ways.items() if way is Way.THREAD]
        limited = [name for name in names if self.app.tasks[name].time_limit or self.app.tasks[name].soft_time_limit]
        if limited:
            shown = ", ".join(sorted(limited)[:3])
            logger.warning(
                "%s `def` tasks (%s) have time limits: a thread cannot be stopped, so they have no effect under "
                "--pool=asyncio. Make them `async def`, or run a worker of another worker pool for them.",
                len(limited), shown,
            )  # fmt: skip

    def _begin(self) -> None:
        """Called on the loop, before any task."""
        app, loop, limit = self.app, self.loop, max(self.limit or 0, 1)
        self.executor = DaemonExecutor(self.starter, max(limit, TO_THREAD))
        loop.set_default_executor(self.executor)
        self.bodies = Threads(self.starter, loop, "body", limit, limit)
        self.results = Threads(self.starter, loop, "results", min(RESULTS, limit), limit)
        self.requests = Threads(self.starter, loop, "requests", REQUESTS, limit)
        senders = app.conf.broker_pool_limit or offloading.MESSAGES
        self.messages = Threads(self.starter, loop, "messages", senders, senders)
        self._offloads = offloading.Offloads(app, self.results, self.messages)
        limit_s = app.conf.get(BLOCKED_SETTING) or BLOCKED_S
        self._watchdog = Watchdog(loop, self.starter, limit_s, self._identity_of, self._beat)
        self._watchdog.start()

    async def _dispose(self) -> None:
        """Close the database connections of the loop; called on it, last."""
        for db in apps.databases(self.app).values():
            strategy = db.coroutines.started
            if strategy is not None:
                await greenlet_spawn(strategy.dispose)

    def _way_of(self, name: str) -> Way:
        way = self._ways.get(name)
        if way is None:
            task = self.app.tasks[name]
            way = self._ways[name] = prepare(task)
        return way

    def _identity_of(self, task: Any) -> identity.Identity | None:
        return next((job.identity for job in list(self._running) if job.task is task), None)

    def _beat(self) -> None:
        for threads in (self.results, self.requests):
            threads.watch()

    # -- the consumer's thread ----------------------------------------------------------------------------------------

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any = None,
        kwargs: Any = None,
        callback: Callable[..., Any] | None = None,
        accept_callback: Callable[..., Any] | None = None,
        error_callback: Callable[..., Any] | None = None,
        timeout_callback: Callable[..., Any] | None = None,
        soft_timeout: float | None = None,
        timeout: float | None = None,
        **_: Any,
    ) -> Job:
        name, task_id = args[:2] if len(args) > 1 else ("", "")
        job = Job(
            self,
            self._way_of(name) if name in self.app.tasks else Way.THREAD,
            functools.partial(target, *args, **(kwargs or {})),
            Report(accept_callback, callback, error_callback, timeout_callback),
            f"{name}[{task_id}]",
            (soft_timeout or self.options.get("soft_timeout"), timeout or self.options.get("timeout")),
        )
        if self._hub is not None and job.report.request is not None:
            _celery.settle_by(job.report.request, self._hub.call)
        self._incoming.append(job)
        if not self._told:
            self._told = True
            self.call(self._arrive)
        return job

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call `function` on the loop soon, from any thread."""
        assert self._thread is not None
        self._thread.call(function, *args)

    def terminate_job(self, pid: Any, signal: Any = None) -> None:
        """End the job that has told its request this `pid`. Called before Celery stores that it is revoked, which may
        take long."""
        job: Job | None = getattr(pid, "job", None)
        if job is None:
            return  # it has ended
        told = job.report.is_told_to_end()
        if not told:  # the worker ends, or has lost its broker: what waits may not take the slot that becomes free
            self.call(self._drop_waiting)
        if job.way is Way.THREAD:
            message = f"{job.identity.label} is a `def` task, which runs in a thread: it cannot be stopped."
            if told:
                raise NotImplementedError(message)
            logger.warning("%s", message)
            return
        job.terminate(signal)
        if self._hub is not None:
            self._hub.call(job.report.settle_revoked)

    def grow(self, n: int = 1) -> None:
        """Let `n` more tasks run at a time."""
        self.limit += n
        self.call(self._resize)

    def shrink(self, n: int = 1) -> None:
        """Let `n` fewer tasks run at a time; those that run go on."""
        self.limit = max(self.limit - n, 1)
        self.call(self._resize)

    def flush(self) -> None:
        """The connection to the broker is lost: it delivers again what is not acknowledged, so nothing of that may wait
        here."""
        self.call(self._drop_waiting)

    def register_with_event_loop(self, hub: Any) -> None:
        self._hub = self._hub or HubThread()
        self._hub.use(hub)
        self.acknowledges_elsewhere = True

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        threads = {name: getattr(self, name).count for name in ("bodies", "results", "requests", "messages")}
        return info | {
            "running": len(self._running),
            "waiting": len(self._waiting) + len(self._incoming),
            "threads": threads,
            "timeouts": [self.options.get("soft_timeout") or 0, self.options.get("timeout") or 0],
        }

    # -- on the loop --------------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        self._told = False
        while self._incoming:
            self._waiting.append(self._incoming.popleft())
        self._fill()

    def _fill(self) -> None:
        if self._closing:
            self._drop_waiting()
        while self._waiting and len(self._running) < self.limit:
            job = self._waiting.popleft()
            self._running.add(job)
            job.start()

    def _resize(self) -> None:
        for threads in (self.bodies, self.results, self.requests):
            threads.most = max(threads.most, self.limit)
        self.bodies.eager = self.bodies.most
        self.executor.most = max(self.executor.most, self.limit)
        self._fill()

    def _drop_waiting(self) -> None:
        self._incoming.clear()
        self._waiting.clear()

    def forget(self, job: Job) -> bool:
        """Let `job` wait no more; tell whether it did."""
        with contextlib.suppress(ValueError):
            self._waiting.remove(job)
            return True
        return False

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Wait for `task` before the worker ends; it takes no slot."""
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)
        task.add_done_callback(lambda _: self._look_idle())

    def ended(self, job: Job) -> None:
        """`job` has been told of; its slot is free."""
        self._running.discard(job)
        if self._waiting or self._closing:
            self._fill()
        self._look_idle()

    def _look_idle(self) -> None:
        if self._closing and not self._running and not self._kept:
            self._idle.set()

    def _close(self) -> None:
        self._closing = True
        self._drop_waiting()
        self._look_idle()

    def _kill_all(self, *, shutdown: bool) -> None:
        for job in list(self._running):
            job.kill(shutdown=shutdown)

    # -- the end ------------------------------------------------------------------------------------------------------

    def on_stop(self) -> None:
        """Let what runs end; what waits goes back to the broker. After a cold shutdown what runs has been cancelled,
        and has a few seconds."""
        self._end(kills=bool(state.should_terminate))
        if not state.should_terminate and self._hub is not None:
            self._hub.serve()  # else the hub's end would lose what the last tasks have to acknowledge

    def on_terminate(self) -> None:
        """End what runs: it is not acknowledged where it is to be late, and goes back to the broker."""
        self._end(kills=True)
        if self._hub is not None:
            self._hub.serve()

    def _end(self, *, kills: bool) -> None:
        if self._thread is None or self._gave_up or not self._thread.is_alive:
            return
        self.call(self._close)
        if not kills:
            # A signal handler that runs in this thread meanwhile may end it at once.
            while not self._idle.wait(0.5) and not self._gave_up:
                if self._hub is not None:
                    self._hub.serve()
        elif not self._idle.is_set():
            self._kill_and_wait()
        if self._offloads is not None:
            self._offloads.undo()
        if self._watchdog is not None:
            self._watchdog.stop()
        for threads in (self.bodies, self.results, self.requests, self.messages):
            threads.close()
        self.executor.shutdown()
        self.starter.close()
        if not self._thread.end(1 if self._gave_up else 3 * END_S):
            logger.error("The event loop of the worker pool did not end: a task blocks it")
        if self._hub is not None:
            self._hub.serve()  # what the last tasks have acknowledged, which would run again

    def _kill_and_wait(self) -> None:
        self.call(functools.partial(self._kill_all, shutdown=False))
        if not self._idle.wait(KILL_S):
            self.call(functools.partial(self._kill_all, shutdown=True))
            if not self._idle.wait(KILL_S / 2):
                names = ", ".join(job.identity.label for job in list(self._running)[:5])
                logger.error("%s of the worker's tasks did not end: %s", len(self._running), names)
                self._gave_up = True

    @property
    def num_processes(self) -> int:
        return int(self.limit)


def refuse_options(options: dict[str, Any]) -> None:
    """Refuse what is meant for pool processes.

    Raises:
        ConfigurationError: names the option.
    """
    for option, spelling in (
        ("maxtasksperchild", "--max-tasks-per-child (worker_max_tasks_per_child)"),
        ("max_memory_per_child", "--max-memory-per-child (worker_max_memory_per_child)"),
    ):
        if options.get(option):
            raise ConfigurationError(
                f"{spelling} is for pool processes, which are replaced; --pool=asyncio runs its tasks in one process. "
                "Leave it out, and let your service manager restart the worker."
            )
    if importlib.util.find_spec("greenlet") is None:
        raise ConfigurationError(
            "--pool=asyncio needs greenlet, which SQLAlchemy 2.1 does not install: install 'sqlalchemy[asyncio]'."
        )
    if _celery.uses_fast_locals():
        raise ConfigurationError(
            "The environment variable USE_FAST_LOCALS is set: all tasks of an event loop would be one to "
            "`current_task`. --pool=asyncio cannot work so. Unset it."
        )
