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
from collections.abc import Mapping
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

    # If this process dies first: what `watch_...` says is done. They return the number to `forget`.

    def watch_process(self, pid: int, stop_signal: signal.Signals = signal.SIGKILL) -> int:
        """Stop the process group that `pid` leads."""
        return self._add(pid=pid, signal=int(stop_signal))

    def watch_directory(self, path: Path) -> int:
        """Remove the directory."""
        return self._add(directory=str(path))

    def watch_call(self, function: str, *args: str) -> int:
        """Call `"module:function"` with `args`."""
        return self._add(function=function, args=args)

    def forget(self, number: int) -> None:
        """Take back: it has been cleaned up."""
        self._send({"forget": number})

    def close(self) -> None:
        """End the guard, which cleans up whatever was not taken back."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _add(self, **entry: Any) -> int:
        number = next(self._count)
        self._send({"add": number, **entry})
        return number

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        # A guard that was killed must not break the run it guards.
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()


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


def _clean_up(entry: dict[str, Any]) -> None:
    if "pid" in entry:
        _stop_group(entry["pid"], entry["signal"])
    elif "directory" in entry:
        shutil.rmtree(entry["directory"], ignore_errors=True)
    else:
        module, _, function = entry["function"].partition(":")
        getattr(importlib.import_module(module), function)(*entry["args"])


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
            _clean_up(entry)


if __name__ == "__main__":
    main()
