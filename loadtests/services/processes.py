"""Child processes that always end: own process group, log file, bounded stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import psutil

from ..errors import LoadTestError
from .rundir import RunDirectory

KILL_WAIT_S = 5.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

T = TypeVar("T")


class StopStep(NamedTuple):
    """One rung of the ladder: a signal to the process, and the seconds it gets to end."""

    signal: signal.Signals
    wait_s: float


class Process(Protocol):
    """What is asked of a process here: a subprocess.Popen, or what can be spoken to as one."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...


class ChildProcess:
    """A running child that leads its own process group and logs to a file."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path, steps: Sequence[StopStep]) -> None:
        self._process, self._log_path, self._steps = process, log_path, steps
        self.pid: int = process.pid  # The process id, which is the process group's too
        self.ended_by: signal.Signals | None = None
        """The last signal it took to end it; None if it ended by itself or still runs."""

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        """Wait for it to end by itself; return its exit code, None if it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return self.exit_code

    def when_ready(
        self, announced: Callable[[], T | None], what: str, within_s: float, error: type[LoadTestError]
    ) -> T:
        """Do as the function does; the error ends with the log."""
        try:
            return when_ready(announced, lambda: self.exit_code, what, within_s, error)
        except error as unready:
            raise error(f"{unready}\n{self.log_tail()}") from None

    def log_tail(self, lines: int = 30) -> str:
        """Return the last lines of the log."""
        with contextlib.suppress(OSError):
            return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def stop(self, *, at_once: bool = False) -> None:
        """End the process and all of its group within the time its steps allow; a second call does nothing.

        Args:
            at_once: With SIGKILL, without the gentler steps.
        """
        self.ended_by = stop_group(self._process, () if at_once else self._steps) or self.ended_by


def when_ready(
    announced: Callable[[], T | None], exit_code: Callable[[], int | None], what: str, within_s: float,
    error: type[LoadTestError],
) -> T:  # fmt: skip
    """Return what a process says of itself once it serves.

    Args:
        announced: May wait a moment for it; None, or nothing, if it has not come.
        error: Raised if the process has ended, or the time is over.
    """
    deadline = time.monotonic() + within_s
    while True:
        if found := announced():
            return found
        if (code := exit_code()) is not None:
            raise error(f"{what} ended with code {code} before it was ready.")
        if time.monotonic() > deadline:
            raise error(f"{what} was not ready in time.")
        time.sleep(0.02)


def stop_group(
    process: Process, steps: Sequence[StopStep], told: Callable[[], object] = lambda: None
) -> signal.Signals | None:
    """End the process and all of its group within the time the steps allow; return the last signal it took.

    Args:
        told: Called after each signal; a worker that waits for a message may see the signal only with the next one.
    """
    ended_by: signal.Signals | None = None
    for step in steps:
        if process.poll() is not None:
            break
        ended_by = step.signal
        # The leader only: it stops its own children in order; the rest of the group is killed below.
        process.send_signal(step.signal)
        told()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(step.wait_s)
    if process.poll() is None:
        ended_by = signal.SIGKILL
    deadline = time.monotonic() + KILL_WAIT_S
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)
            process.poll()
            if not _anyone_left(process.pid):
                break
            time.sleep(0.01)
    process.wait(KILL_WAIT_S)
    return ended_by


def _anyone_left(group: int) -> bool:
    """Return whether a process of the group still runs: a container may have no init that waits for orphans."""
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            # The group first: it is one system call, and all else of a process takes several files.
            if os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def start_group(
    command: Sequence[str | Path], log_path: Path, *, environ: Mapping[str, str], cwd: Path, **account: Any
) -> subprocess.Popen[bytes]:
    """Start a process that leads its own process group and appends what it says to a file."""
    with log_path.open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - commands come from this package and its tests.
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=dict(environ), cwd=cwd,
            # Ctrl-C in the terminal must reach the load generator alone, which stops its children in order.
            start_new_session=True, **account,
        )  # fmt: skip


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Let a stop signal that arrives during the block take effect at its end; in the main thread only.

    An interrupt in the middle of `Popen` would leave a child whose pid is not known. Blocking the signals instead
    would be inherited by the child, which could then not be stopped with them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {number: signal.signal(number, lambda arrival, _: arrived.append(arrival)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for arrival in arrived:
            signal.raise_signal(arrival)


@contextmanager
def child_process(
    run: RunDirectory, name: str, command: Sequence[str | Path], *, environ: Mapping[str, str],
    steps: Sequence[StopStep], cwd: Path | None = None, orphan_signal: signal.Signals = signal.SIGKILL, **account: Any,
) -> Iterator[ChildProcess]:  # fmt: skip
    """Start a child, and stop it when the block ends.

    Args:
        steps: How to stop it, gentlest first; SIGKILL to its process group always comes last.
        orphan_signal: What the guard sends to its process group if this process is killed.
        account: Of Popen: `user`, `group` and `extra_groups` to run as instead of the present ones.
    """
    log_path = run.path / f"{name}.log"
    log_path.unlink(missing_ok=True)  # of one with the same name before
    with deferred_signals():
        process = start_group(command, log_path, environ=environ, cwd=cwd or run.path, **account)
        guarded = run.guard.watch_process(process.pid, orphan_signal)
    child = ChildProcess(process, log_path, steps)
    try:
        yield child
    finally:
        child.stop()
        run.guard.forget(guarded)
