"""Interpreters that have imported what every worker imports, and fork a `python -m celery ...` when asked to.

Four fifths of the time a worker takes to start are imports of SQLAlchemy, Celery and redis-py. The covering set starts
its workers this way; the full run starts each in an interpreter of its own. Nothing of celery-alchemy is imported
before the fork, and for gevent and eventlet Celery's patch comes first, as it does in `python -m celery`.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODULES = (
    "celery.bin.celery",
    "celery.apps.worker",
    "celery.backends.redis",
    "celery.concurrency.prefork",
    "celery.concurrency.solo",
    "celery.concurrency.thread",
    "celery.worker.autoscale",
    "celery.worker.components",
    "celery.worker.consumer",
    "celery.worker.strategy",
    "kombu.transport.redis",
    "psycopg",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.ext.asyncio",
    "sqlalchemy.orm",
)
GREEN = ("gevent", "eventlet")
POLL_S = 0.01
enabled = False
"""Whether the workers of this run start so."""
_running: dict[str, "Interpreter"] = {}
_starting = threading.Lock()


class Process:
    """A process that an interpreter has forked, spoken to as a subprocess.Popen."""

    def __init__(self, interpreter: "Interpreter", pid: int) -> None:
        self._interpreter = interpreter
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._interpreter.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Interpreter:
    """A running interpreter that forks."""

    def __init__(self, library: str) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.preloaded", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
            start_new_session=True,
        )

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        assert answer, f"the interpreter of the workers ended with {self._process.wait(5)}"
        return json.loads(answer)

    def close(self) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()


ROOT = Path(__file__).resolve().parent.parent


def library_of(arguments: Sequence[str]) -> str:
    """Return the library that `celery` with these arguments is patched by, "" for none."""
    return next((argument for argument in arguments if argument in GREEN), "")


def start(
    command: Sequence[str], cwd: Path, log: Path, environment: Mapping[str, str], errors: Path | None = None
) -> Process:
    """Start a `python -m celery` in a session of its own."""
    assert list(command[:3]) == [sys.executable, "-m", "celery"]
    library = library_of(command)
    with _starting:
        interpreter = _running.get(library) or _running.setdefault(library, Interpreter(library))
    files = {"stdout": str(log), "stderr": str(errors or log)}
    return Process(
        interpreter, interpreter.ask(fork=list(command[3:]), cwd=str(cwd), files=files, environment=dict(environment))
    )


def run(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
) -> "subprocess.CompletedProcess[str]":
    """Run a `python -m celery` to its end."""
    if not enabled:
        return subprocess.run(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = start(command, cwd, files[0], env, files[1])
        try:
            code = process.wait(timeout)
        finally:
            process.send_signal(signal.SIGKILL)
        return subprocess.CompletedProcess(command, code, *(file.read_text() for file in files))


def close() -> None:
    """End all interpreters."""
    while _running:
        _running.popitem()[1].close()


def main() -> None:
    library = sys.argv[1]
    fork = os.fork
    if library:
        celery: Any = importlib.import_module("celery")
        celery.maybe_patch_concurrency(["celery", "worker", "--pool", library])
        _import_each(f"celery.concurrency.{library}")
    _import_each(*MODULES)
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    places = [place for place in sys.path[1:] if place not in given]  # the first is where this was started
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            _answer(os.waitstatus_to_exitcode(status) if pid else None)
        elif (pid := fork()) == 0:
            if library:
                renew_hub(library)
            become(question, places)
            return
        else:
            _answer(pid)


def renew_hub(library: str) -> None:
    """Leave the hub that imports may have made to the parent: siblings would share its epoll."""
    if library == "gevent":
        importlib.import_module("gevent").reinit()
    else:
        importlib.import_module("eventlet.hubs").use_hub()


def become(question: Mapping[str, Any], places: Sequence[str]) -> None:
    """Be the process that was asked for."""
    os.setsid()
    os.chdir(question["cwd"])
    os.environ.clear()
    os.environ.update(question["environment"])
    append = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    files = ((os.devnull, os.O_RDONLY), (question["files"]["stdout"], append), (question["files"]["stderr"], append))
    for target, (path, flags) in enumerate(files):
        descriptor = os.open(path, flags, 0o666)
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process
    sys.stdout.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
    sys.path[:] = [question["cwd"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *places]
    sys.argv[:] = ["celery", *question["fork"]]
    runpy.run_module("celery", run_name="__main__", alter_sys=True)


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _import_each(*names: str) -> None:
    for name in names:
        importlib.import_module(name)


if __name__ == "__main__":
    main()
