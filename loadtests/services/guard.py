"""Clean up after a load generator that was killed: a small process that outlives it.

It reads what to clean up from a pipe. When the pipe closes, because its parent ended in any way at all, it cleans up
what was not taken back, last first. This works on every POSIX system and for grandchildren, where Linux's parent-death
signal reaches direct children only, and fires when the thread that started them ends.

Run as a file, with the standard library only: it starts in 20 ms, and imports the package only if it has to.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STOP_S = 5.0


def with_package(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a Python child that must find this package, installed or not."""
    places = [str(Path(__file__).parents[3]), environ.get("PYTHONPATH", "")]
    return {**environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}


class Guard:
    """Hold things that must not outlive this process: servers, workers, directories, databases."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - our own file.
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            cwd="/",
            env=with_package(os.environ),
            # A session of its own: neither Ctrl-C nor a kill of the parent's process group reaches it.
            start_new_session=True,
        )
        self._count = itertools.count(1)
        # Workers are started by several threads.
        self._lock = threading.Lock()

    def watch(self, function: Callable[..., object], *args: str | int) -> int:
        """Call a function of a module if this process dies first; return the number to `forget`."""
        number = next(self._count)
        module = "" if function.__module__ == __name__ else function.__module__
        self._send({"add": number, "module": module, "function": function.__name__, "args": args})
        return number

    def watch_process(self, pid: int, stop_signal: signal.Signals = signal.SIGKILL) -> int:
        """Stop the process group that `pid` leads if this process dies first; return the number to `forget`."""
        return self.watch(_stop_group, pid, int(stop_signal))

    @contextmanager
    def undoing(
        self, function: Callable[..., object], *args: str, tolerated: tuple[type[Exception], ...]
    ) -> Iterator[None]:
        """Call a function of a module when the block ends, or if this process dies first.

        Args:
            tolerated: Errors of it that do not matter here; then it is called once more at the end.
        """
        number = self.watch(function, *args)
        try:
            yield
        finally:
            with contextlib.suppress(*tolerated):
                function(*args)
                self.forget(number)

    def forget(self, number: int) -> None:
        """Take back: it has been cleaned up."""
        self._send({"forget": number})

    def close(self) -> None:
        """End the guard, which cleans up whatever was not taken back."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        # A guard that was killed must not break the run it guards.
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()


def remove_directory(path: str) -> None:
    """Remove a directory, or what of it there is."""
    shutil.rmtree(path, ignore_errors=True)


def _stop_group(pid: int, stop_signal: int) -> None:
    deadline = time.monotonic() + STOP_S
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, stop_signal)
        while time.monotonic() < deadline and not _is_zombie(pid):
            os.killpg(pid, 0)
            time.sleep(0.02)
        os.killpg(pid, signal.SIGKILL)


def _is_zombie(pid: int) -> bool:
    """Return whether it has ended and only its new parent has not noticed, as in containers without an init."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def main() -> None:
    """Collect entries until the parent is gone, then clean up what is left."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    entries: dict[int, dict[str, Any]] = {}
    for line in sys.stdin:
        message: dict[str, Any] = json.loads(line)
        if "add" in message:
            entries[message["add"]] = message
        else:
            entries.pop(message["forget"], None)
    for entry in reversed(entries.values()):
        with contextlib.suppress(Exception):
            place = importlib.import_module(entry["module"]) if entry["module"] else sys.modules[__name__]
            getattr(place, entry["function"])(*entry["args"])


if __name__ == "__main__":
    main()
