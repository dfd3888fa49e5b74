"""Interpreters that have imported what every worker imports, and fork a `python ...` when asked to.

Four fifths of the time a worker takes to start are imports of SQLAlchemy, Celery and redis-py. The covering set starts
its workers this way; the full run starts each in an interpreter of its own. Nothing of celery-alchemy is imported
before the fork, and for gevent and eventlet Celery's patch comes first, as it does in `python -m celery`.
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

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
MESSAGE_BYTES = 1 << 16
enabled = False
"""Whether the workers and programs of this run start so."""
_running: dict[str, "Interpreter"] = {}
_starting = threading.Lock()
Files = tuple[int, int, int]


class Process:
    """A process that an interpreter has forked, spoken to as a subprocess.Popen."""

    def __init__(self, interpreter: "Interpreter", pid: int) -> None:
        self._interpreter = interpreter
        self.pid = pid
        self.returncode: int | None = None
        self.stdin: IO[Any] | None = None
        self.stdout: IO[Any] | None = None

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

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Interpreter:
    """A running interpreter that forks; it has imported `more`, too.

    Args:
        environment: Set while it imports, beside ours; what it forks gets one of its own.
    """

    def __init__(self, library: str, *more: str, environment: Mapping[str, str] | None = None) -> None:
        self._lock = threading.Lock()
        self._channel, its = socket.socketpair()
        self._answers = self._channel.makefile("rb")
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.preloaded", str(its.fileno()), library, *more],
                stdin=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
                env={
                    **os.environ, **(environment or {}),
                    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                },
                start_new_session=True,
            )  # fmt: skip

    def ask(self, files: Files | tuple[()] = (), **question: Any) -> Any:
        with self._lock:
            message = json.dumps(question).encode() + b"\n"
            self._channel.sendall(message[socket.send_fds(self._channel, [message], files) :])
            answer = self._answers.readline()
        assert answer, f"the interpreter of the workers ended with {self._process.wait(5)}"
        return json.loads(answer)

    def close(self) -> None:
        with self._process:
            self._answers.close()
            self._channel.close()


ROOT = Path(__file__).resolve().parent.parent


def library_of(arguments: Sequence[str]) -> str:
    """Return the library that `celery` with these arguments is patched by, "" for none."""
    return next((argument for argument in arguments if argument in GREEN), "")


def start(
    command: Sequence[str],
    cwd: Path,
    log: Path,
    environment: Mapping[str, str],
    errors: Path | None = None,
    interpreter: Interpreter | None = None,
) -> Process:
    """Start a Python program in a session of its own, whose output goes into files.

    Args:
        interpreter: Forks it, instead of the one that the command needs.
    """
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(path.open("ab")) for path in (log, errors or log)]
        nothing = stack.enter_context(open(os.devnull))
        files = (nothing.fileno(), opened[0].fileno(), opened[1].fileno())
        return _start(command, cwd, environment, files, interpreter)


def start_talking(
    command: Sequence[str], cwd: Path, errors: Path, environment: Mapping[str, str], *, own: bool = False
) -> "Process | subprocess.Popen[bytes]":
    """Start a Python program in a session of its own, with pipes to its standard input and output.

    One that needs an interpreter of its `own` gets one.
    """
    with errors.open("ab") as log:
        if own or not enabled:
            return subprocess.Popen(
                command, cwd=cwd, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True, bufsize=0,
            )  # fmt: skip
        (its_in, ours_out), (ours_in, its_out) = os.pipe(), os.pipe()
        process = _start(command, cwd, environment, (its_in, its_out, log.fileno()))
    os.close(its_in)
    os.close(its_out)
    process.stdin, process.stdout = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb", 0)
    return process


def _start(
    command: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    files: Files,
    interpreter: Interpreter | None = None,
) -> Process:
    assert command[0] == sys.executable
    library = library_of(command) if list(command[1:3]) == ["-m", "celery"] else ""
    if interpreter is None:
        with _starting:
            interpreter = _running.get(library) or _running.setdefault(library, Interpreter(library))
    return Process(
        interpreter, interpreter.ask(files, fork=list(command[1:]), cwd=str(cwd), environment=dict(environment))
    )


def run(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
) -> "subprocess.CompletedProcess[str]":
    """Run a Python program to its end."""
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
            process.kill()
        return subprocess.CompletedProcess(command, code, *(file.read_text() for file in files))


def close() -> None:
    """End all interpreters."""
    while _running:
        _running.popitem()[1].close()


def main() -> None:
    # Taken before a patch replaces them.
    fork, receive, channel = os.fork, socket.recv_fds, socket.socket(fileno=int(sys.argv[1]))
    library = sys.argv[2]
    if library:
        celery: Any = importlib.import_module("celery")
        celery.maybe_patch_concurrency(["celery", "worker", "--pool", library])
        _import_each(f"celery.concurrency.{library}")
    _import_each(*MODULES, *sys.argv[3:])
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    places = [place for place in sys.path[1:] if place not in given]  # the first is where this was started
    gc.collect()
    gc.freeze()
    while True:
        message, files, _, _ = receive(channel, MESSAGE_BYTES, 3)
        while message and not message.endswith(b"\n"):
            message += channel.recv(MESSAGE_BYTES)
        if not message:
            return
        question = json.loads(message)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := fork()) == 0:
            channel.close()
            if library:
                renew_hub(library)
            become(question, files, places)
            return
        for file in files:
            os.close(file)
        channel.sendall(json.dumps(answer).encode() + b"\n")


def renew_hub(library: str) -> None:
    """Leave the hub that imports may have made to the parent: siblings would share its epoll."""
    if library == "gevent":
        importlib.import_module("gevent").reinit()
    else:
        importlib.import_module("eventlet.hubs").use_hub()


def become(question: Mapping[str, Any], files: Sequence[int], places: Sequence[str]) -> None:
    """Be the process that was asked for."""
    os.setsid()
    os.chdir(question["cwd"])
    os.environ.clear()
    os.environ.update(question["environment"])
    for target, descriptor in enumerate(files):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process
    live = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdout.reconfigure(line_buffering=live, write_through=live)  # type: ignore[union-attr]
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    paths = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *places]
    program(question["fork"], question["cwd"], paths)


def program(arguments: Sequence[str], cwd: str, paths: Sequence[str]) -> None:
    """Run what `python` runs with these arguments: `-m` a module, `-c` code, or a file."""
    what, *rest = arguments
    sys.path[:] = [cwd if what in {"-m", "-c"} else os.path.dirname(what), *paths]
    if what == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    else:
        sys.argv[:] = arguments
        runpy.run_path(what, run_name="__main__")


def _import_each(*names: str) -> None:
    for name in names:
        importlib.import_module(name)


if __name__ == "__main__":
    main()
