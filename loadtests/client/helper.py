"""The process beside a Locust run, which holds the services and the worker: see `loadtests/serve.py`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import Any

import gevent
from gevent.event import Event

from ..errors import LoadTestError
from ..guard import with_package

START_S = 120.0
FINISH_S = 90.0
STOP_S = 30.0


class Helper:
    """A running helper; nothing of it outlives this process."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        """Start it, and wait until it is ready.

        Raises:
            LoadTestError: It is not; the message says why.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CELERY")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "celery_alchemy.loadtests.serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=with_package(inherited),
            text=True,
            # Ctrl-C is for Locust alone, which lets the tasks in flight end first.
            start_new_session=True,
        )
        self.sample: dict[str, Any] = {}
        """What was seen last of the worker's connections."""
        self._answered, self._ended = Event(), Event()
        self._ready: dict[str, Any] = {}
        self._error = ""
        self._verdicts: list[dict[str, Any]] | None = None
        gevent.spawn(self._read)
        try:
            self._send(wanted)
            if not self._answered.wait(START_S) or not self._ready:
                raise LoadTestError(self._error or f"The worker and its services were not ready within {START_S:g} s.")
        except BaseException:
            self.stop()
            raise

    @property
    def ready(self) -> dict[str, Any]:
        """What the helper said of itself."""
        return self._ready

    def finish(self, tasks: int) -> list[dict[str, Any]]:
        """Stop the worker, and return the verdicts: each with `name`, `passed` and `detail`.

        Raises:
            LoadTestError: It did not say.
        """
        self._send({"finish": {"tasks": tasks}})
        self._ended.wait(FINISH_S)
        self.stop()
        if self._verdicts is None:
            raise LoadTestError("The process with the worker ended without a verdict.")
        return self._verdicts

    def stop(self) -> None:
        """End it, by closing its stdin first."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            # Its guard cleans up after it.
            self._process.kill()
            self._process.wait(STOP_S)

    def _send(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            match json.loads(line):
                case {"sample": sample}:
                    self.sample = sample
                case {"ready": ready}:
                    self._ready = {"started": True, **ready}
                    self._answered.set()
                case {"error": error}:
                    self._error = error
                case {"end": {"sample": sample, "verdicts": verdicts}}:
                    self.sample, self._verdicts = sample, verdicts
        if not self._ready and not self._error:
            self._error = "The process with the worker ended before it was ready."
        self._answered.set()
        self._ended.set()
