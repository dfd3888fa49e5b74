"""Real `celery worker` subprocesses, and what the tests ask of them."""

import contextlib
import json
import os
import re
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import redis
from celery import Celery, Signature, chain

from celery_alchemy.loadtests.errors import WorkerError
from celery_alchemy.loadtests.services.harness import STOP_STEPS, worker_command
from celery_alchemy.loadtests.services.processes import Process, StopStep, start_group, stop_group, when_ready
from support import everywhere, preloaded
from support.servers import RedisURLs
from support.waiting import eventually

TESTS = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 60
END_TIMEOUT_S = 40
TASK_TIMEOUT_S = 45
CONCURRENCY = {"prefork": 2, "asyncio": 8, "threads": 4, "gevent": 8, "eventlet": 8, "solo": 1}
# Nothing comes after these: the attempt does not end.
KILLED = {"TimeLimitExceeded", "WorkerLostError", "Terminated", "TaskRevokedError"}
T = TypeVar("T")
ALIVE: list["Worker"] = []  # for the log tails of failure reports


@dataclass(frozen=True)
class Site:
    """Where this test run happens: its Redis, the prefix of all its keys, its folder."""

    urls: RedisURLs
    prefix: str
    folder: Path
    redis: "redis.Redis"

    def key(self, kind: str, of: str) -> str:
        return f"{self.prefix}{kind}:{of}"


@dataclass(frozen=True)
class Outcome:
    """How a task ended, as its worker tells."""

    state: str
    value: Any = None
    error: str = ""  # name of the exception's class
    message: str = ""
    traceback: str = ""


@dataclass(eq=False)
class Worker:
    """A `celery worker` in a process group of its own."""

    site: Site
    name: str
    pool: str
    database_url: str
    strategy: str | None = None
    concurrency: int | None = None
    broker_url: str = ""
    result_backend: str = ""  # instead of the site's Redis
    own_broker_url: str = ""  # by which the worker reaches the broker, and the test does not
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    own: bool = False  # in an interpreter of its own, which sees `environment` before it imports anything
    pool_arguments: Sequence[str] | None = None  # instead of --pool and --concurrency
    awaits: bool = False  # the tasks are `async def`: the same source in its other spelling
    brings_engine: bool = False  # Alchemy(app, engine=...)
    writes_when_ready: bool = False
    silent: bool = False  # no result backend, no signal handlers: a greenlet killed from its hub may not wait for Redis
    modules: Sequence[str] = (
        *("endings", "sessions", "nesting", "callbacks", "hooks", "limits", "leaks", "enqueueing", "losing"),
    )
    connections_when_untouched: Sequence[Any] = ()  # what the server listed after a first task without self.db
    expected_code: int | None = 0  # of a warm shutdown; None: the test looks at it itself

    def __post_init__(self) -> None:
        self.concurrency = self.concurrency or CONCURRENCY.get(self.pool, 2)
        self.broker_url = self.broker_url or self.site.urls.celery
        self.queue = f"{self.site.prefix}{self.name}"
        self.log_path = self.site.folder / f"{self.name}.log"
        options = {"global_keyprefix": self.site.prefix} if self.broker_url.startswith("redis") else {}
        self._config = {
            "worker": self.name,
            "queue": self.queue,
            "prefix": self.site.prefix,
            "redis_url": self.site.urls.client,
            "result_backend": "disabled://" if self.silent else self.result_backend or self.site.urls.celery,
            "broker_url": self.own_broker_url or self.broker_url,
            "broker_transport_options": options,
            "database_url": self.database_url,
            "brings_engine": self.brings_engine,
            "awaits": self.awaits,
            "modules": list(self.modules),
            "writes_when_ready": self.writes_when_ready,
            "silent": self.silent,
            "settings": everywhere.SETTINGS
            | ({} if self.brings_engine else {"alchemy_database_url": self.database_url})
            | ({"alchemy_session_strategy": self.strategy} if self.strategy else {})
            | self.settings,
        }
        self._client = Celery("client", broker=self.broker_url, backend="disabled://", set_as_current=False)
        self._client.conf.broker_transport_options = options
        self._connection = self._client.connection_for_write()
        self._producer = self._client.amqp.Producer(self._connection)
        self._process: Process | None = None

    def start(self) -> None:
        """Start the process without waiting for it."""
        # Whether one that is to be green is patched depends on how its worker pool is spelt.
        usual = not self.own and (self.pool_arguments is None or self.pool not in preloaded.GREEN)
        if self.pool_arguments is None:
            self.pool_arguments = ["-P", self.pool, "-c", str(self.concurrency)]
        arguments = (*self.pool_arguments, "-Q", self.queue, *self.arguments)
        command = worker_command("support.project.app", *arguments, hostname=f"{self.name}@here")
        environment = self.environment | self._project()
        self._process = start_process(command, self.log_path, environment, own=not usual)
        ALIVE.append(self)

    def wait_ready(self) -> None:
        key = self.site.key("ready", self.name)
        try:
            announced = partial(self.site.redis.blpop, [key], timeout=0.2)
            when_ready(announced, self.exit_code, f"The {self.pool} worker", START_TIMEOUT_S, WorkerError)
        except WorkerError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def exit_code(self) -> int | None:
        return self._process.poll() if self._process else None

    @property
    def pid(self) -> int:
        """The main process."""
        assert self._process is not None
        return self._process.pid

    def pool_processes(self) -> set[int]:
        """Return the pids of prefork's pool processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return {child.pid for child in psutil.Process(self.pid).children()}
        return set()

    def control(self, command: str, **arguments: Any) -> None:
        """Send a remote-control command to this worker alone."""
        destination = [f"{self.name}@here"]
        self._client.control.broadcast(command, arguments, destination, self._connection)

    def inspect(self, command: str, **arguments: Any) -> Any:
        """Return the answer of this worker to a remote-control command."""
        name = f"{self.name}@here"
        answers = None
        # A worker is ready a moment before it listens to this: Redis keeps no question for those who do not listen yet.
        for _ in range(6):
            answers = answers or self._client.control.broadcast(
                command, arguments, [name], self._connection, reply=True, timeout=5, limit=1
            )
        assert answers, f"{name} does not answer {command!r}"
        return answers[0][name]

    def signal(self, number: int) -> None:
        """Send a signal to the main process, and wait for nothing."""
        assert self._process is not None
        self._process.send_signal(number)

    def end(self, number: int) -> int:
        """Send a signal to the main process, and return the exit code it ends with."""
        assert self._process is not None
        self._process.send_signal(number)
        self.expected_code = None  # the test looks at it
        for _ in range(END_TIMEOUT_S):
            self._wake()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(1)
        raise AssertionError(f"the worker did not end within {END_TIMEOUT_S} s\n{self.log_tail()}")

    def stop(self) -> int | None:
        """Stop the worker: warm, then cold, then by force; return the exit code."""
        if self in ALIVE:
            ALIVE.remove(self)
        code = stop_process(self._process, self._wake) if self._process else None
        self._connection.release()
        return code

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def warnings(self, task: str) -> list[str]:
        """Return the warnings the worker logged that name the task."""
        return [line for line in self.log().splitlines() if "WARNING" in line and re.search(rf"\b{task}\b", line)]

    def send(self, task: str, *args: Any, task_id: str = "", **options: Any) -> str:
        """Send a task; return its id."""
        task_id = task_id or uuid.uuid4().hex
        self._client.send_task(
            task,
            args,
            task_id=task_id,
            queue=self.queue,
            producer=self._producer,
            ignore_result=False,
            **options,
        )
        return task_id

    def send_only(self, task: str, *args: Any, task_id: str) -> None:
        """Send a task under an id of the test's own, whose outcome is not told: not every id can be a name in Redis."""
        self._client.send_task(
            task, args, task_id=task_id, queue=self.queue, producer=self._producer, ignore_result=True
        )

    def signature(self, task: str, *args: Any, immutable: bool = True) -> Signature:
        return self._client.signature(task, args, immutable=immutable, queue=self.queue)

    def send_chain(self, *signatures: Signature) -> list[str]:
        """Send a chain; return the ids of its tasks."""
        ids = [uuid.uuid4().hex for _ in signatures]
        links = [signature.set(task_id=task_id) for signature, task_id in zip(signatures, ids, strict=True)]
        chain(*links, app=self._client).apply_async(producer=self._producer)
        return ids

    def call(self, task: str, *args: Any, **options: Any) -> Outcome:
        """Send a task and wait for its outcome."""
        return self.wait(self.send(task, *args, **options))

    def call_together(self, task: str, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
        """Send all calls at once, wait for all outcomes."""
        return [self.wait(task_id) for task_id in [self.send(task, *args) for args in calls]]

    def wait(self, task_id: str, *, ended: str = "", or_stored: bool = False) -> Outcome:
        """Wait until the task has succeeded or failed, hooks included; with `ended`, until an attempt has ended so.

        With `or_stored` the result backend's word will do: a limit that strikes between the task and its report takes
        the report away. Not for tasks that are retried, whose attempts may store their results in any order.
        """
        deadline = time.monotonic() + TASK_TIMEOUT_S
        outcome: Outcome | None = None
        patience_s = 0.25
        while True:
            popped = self.site.redis.blpop([self.site.key("task", task_id)], timeout=patience_s)
            record = json.loads(popped[1]) if popped else {}
            if ended and record.get("ended") == ended:
                return Outcome(state=ended)
            if "state" in record:
                outcome = Outcome(**record)
            if record.get("ended") == "NONE":
                patience_s = 0.05  # killed: at best one more record comes
            if outcome is None and not popped:
                outcome = self._stored(task_id, or_stored)
            if outcome and (not popped or or_stored or record.get("ended") == outcome.state or outcome.error in KILLED):
                return outcome
            assert self.is_running(), f"the worker ended with {self.exit_code()}\n{self.log_tail()}"
            assert time.monotonic() < deadline, f"no outcome of {task_id} after {TASK_TIMEOUT_S} s\n{self.log_tail()}"

    def said(self, key: str) -> list[Any]:
        """Return, and forget, what tasks have said under this key."""
        name = self.site.key("said", key)
        values, _ = self.site.redis.pipeline().lrange(name, 0, -1).delete(name).execute()
        return [json.loads(value) for value in values]

    def while_all_wait(self, key: str, parties: int, look: Callable[[], T]) -> T:
        """Be the last to come to a barrier of the tasks, and look around before that; return what was seen."""
        barrier = self.site.key("barrier", key)
        come = parties - 1
        eventually(lambda: self.site.redis.get(barrier) == str(come), f"{come} tasks wait at {key}")
        seen = look()
        self.site.redis.incr(barrier)
        self.site.redis.rpush(f"{barrier}:go", *range(parties))
        return seen

    def probe(self) -> list[dict[str, Any]]:
        """Return the report of every pool process, or of the one process."""
        processes = self.concurrency if self.pool == "prefork" else 1
        key = uuid.uuid4().hex
        outcomes = self.call_together("probe", [(key, processes)] * (processes or 1))
        assert [o.state for o in outcomes] == ["SUCCESS"] * len(outcomes), outcomes
        return [outcome.value for outcome in outcomes]

    def _stored(self, task_id: str, any_ending: bool) -> Outcome | None:
        """Return what the result backend says of a killed task; Celery before 5.7 sends no signal for all of them."""
        stored = json.loads(self.site.redis.get(f"{self.site.prefix}celery-task-meta-{task_id}") or "{}")
        result = stored.get("result")
        if isinstance(result, dict) and result.get("exc_type") in KILLED:
            return Outcome(stored["status"], error=result["exc_type"])
        if any_ending and stored.get("status") == "SUCCESS":
            return Outcome("SUCCESS", value=result)
        if any_ending and stored.get("status") == "FAILURE":
            return Outcome("FAILURE", error=result["exc_type"], traceback=stored.get("traceback") or "")
        return None

    def _wake(self) -> None:
        """Send a few messages: a worker that waits for one sees a signal seconds later."""
        for _ in range(8):
            self.send("untouched")

    def _project(self) -> dict[str, str]:
        return {"CONTRACT_PROJECT": json.dumps(self._config)}


#: Starts a worker for the time of a block, and leaves nothing behind.
Start = Callable[..., contextlib.AbstractContextManager[Worker]]


@contextlib.contextmanager
def running(worker: Worker) -> Iterator[Worker]:
    """Run a worker for the time of the block; it must obey a warm shutdown, unless the block has ended it."""
    worker.start()
    try:
        worker.wait_ready()
        yield worker
    finally:
        code = worker.stop()
    if worker.expected_code is not None:
        assert code == worker.expected_code, f"the worker ended with {code}\n{worker.log_tail()}"


def start_process(command: Sequence[str], log: Path, environment: dict[str, str], *, own: bool = True) -> Process:
    """Start a process in a group of its own, far from the checkout, that finds `support` and its own folder.

    A `celery` that need not have an interpreter of its own may be forked by one that has loaded it.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "PYTEST_"))}
    paths = [str(TESTS), environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]
    environment = {**inherited, "PYTHONUNBUFFERED": "1", **environment}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    log.parent.mkdir(parents=True, exist_ok=True)
    if preloaded.enabled and not own:
        return preloaded.start(command, log.parent, log, environment)
    return start_group(command, log, environ=environment, cwd=log.parent)


def stop_process(process: Process, wake: Callable[[], object] = lambda: None) -> int:
    """Stop a process group within bounds: TERM, QUIT, KILL."""
    stop_group(process, [StopStep(step.signal, 2 * step.wait_s) for step in STOP_STEPS], wake)
    return process.wait(5)
