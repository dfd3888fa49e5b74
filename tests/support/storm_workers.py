"""The workers of a storm: they die at a named point by themselves, or are killed at a random moment, and others follow.

A process draws when it is born how it is to die (`scripts/storm_app.py`), and says so. All of them are forked by one
interpreter that has loaded the app: that is what makes a kill cheap.
"""

import contextlib
import json
import os
import random
import signal
import struct
import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import preloaded
from support.storm_verdict import Messages, Setup

TESTS = Path(__file__).resolve().parent.parent
APP = "scripts.storm_app"
POOLS = {"prefork": 4, "threads": 4, "gevent": 6, "eventlet": 6, "solo": 1, "asyncio": 6}
POLLS_EVERY_S = 1.0
#: A process that is to die at a random moment does so so soon after it has something in hand; one that has not come to
#: its point after the longer time dies at a random moment too.
MOMENT_S, OVERDUE_S = 0.6, 2.5
MAIN_MOMENT_S, MAIN_OVERDUE_S = 8.0, 12.0
"""The same for the main process of prefork, whose pool processes are to die meanwhile."""
LOADED = (
    *("celery_alchemy", "celery_alchemy.workers.starting.bootstep", "celery_alchemy.workers.exactly_once.runner"),
    *("celery_alchemy.workers.exactly_once.backend", "celery_alchemy.workers.sending.outbox", "pymysql"),
    *("sqlalchemy.dialects.mysql.pymysql", "kombu.transport.pyamqp", "celery.bin.worker", "logging.handlers"),
)


@dataclass
class Alive:
    """A process of a worker."""

    pid: int
    parent: int
    main: bool
    """It is what was started; not a pool process of it."""
    at_moment: bool
    """It is to die at a random moment, not at a named point."""
    strikes_at: float | None = None


class Workers:
    """So many workers, of which there are always others.

    Args:
        config: Of `scripts/storm_app.py`.
        folder: For the log, and for what the processes say.
    """

    def __init__(self, setup: Setup, config: dict[str, Any], folder: Path, count: int, chance: random.Random) -> None:
        self._pool, self._folder, self._count, self._chance = setup.pool, folder, count, chance
        self.log, self.events = folder / "log", folder / "events"
        self._read_to = 0
        self.kills: Counter[str] = Counter()
        """Of processes that had something in hand: at which point, or what was struck at random."""
        self.idle_kills = 0
        self.ready = 0
        self.messages = Messages()
        self._running: dict[int, preloaded.Process] = {}
        self._alive: dict[int, Alive] = {}
        self._gone: set[int] = set()
        self._polls_at = 0.0
        library = setup.pool if setup.pool in preloaded.GREEN else ""
        self._environment = {"STORM_APP": json.dumps({**config, "worker": True}), "PYTHONFAULTHANDLER": "1"}
        asyncio = ("celery_alchemy.workers.asyncio_pool.pool",) if setup.pool == "asyncio" else ()
        self._interpreter = preloaded.Interpreter(library, *LOADED, *asyncio, APP, environment=self._environment)

    def close(self) -> None:
        """End everything."""
        self.end()
        self._interpreter.close()

    def end(self) -> None:
        """Kill all of them."""
        for worker in list(self._running.values()):
            self._end(worker)

    def tend(self) -> None:
        """Hear what the processes have said; start workers in place of those that are gone."""
        self.listen()
        now = time.monotonic()
        if now >= self._polls_at:
            self._polls_at = now + POLLS_EVERY_S
            self._gone.update(pid for pid, worker in self._running.items() if worker.poll() is not None)
        for pid in self._gone & set(self._running):
            self._end(self._running[pid])
        self._gone.clear()
        while len(self._running) < self._count:
            self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "celery", "-A", APP, "worker", "-P", self._pool, "-c", str(POOLS[self._pool])]
        command += ["-l", "INFO", "-n", f"{uuid.uuid4().hex[:8]}@here"]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        environment = {**os.environ, **self._environment}
        environment |= {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
        worker = preloaded.start(command, TESTS, self.log, environment, interpreter=self._interpreter)
        self._running[worker.pid] = worker

    def _end(self, worker: preloaded.Process) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait(10)
        del self._running[worker.pid]
        for one in [one for one in self._alive.values() if worker.pid in (one.pid, one.parent)]:
            self._bury(one.pid)

    def _bury(self, pid: int) -> None:
        self._alive.pop(pid, None)
        (self._folder / f"hand-{pid}").unlink(missing_ok=True)

    # -- what they say -----------------------------------------------------------------------------------------------

    def listen(self) -> None:
        with self.events.open("rb") as file:
            file.seek(self._read_to)
            said = file.read()
        said = said[: said.rfind(b"\n") + 1]
        self._read_to += len(said)
        for line in said.decode().splitlines():
            what, *words = line.split(" ", 2)
            if what == "born":
                pid, parent, rest = int(words[0]), *words[1].split(" ", 1)
                role, fate = rest.split(" ")
                self._alive[pid] = Alive(pid, int(parent), role == "main", fate == "moment")
            elif what == "killed":
                self._count_kill(int(words[0]), f"at a point: {words[1]}")
            elif what == "ready":
                self.ready += 1
            else:
                self.messages.note(what, words)

    def _count_kill(self, pid: int, how: str) -> None:
        if self.in_hand(pid):
            self.kills[how] += 1
        else:
            self.idle_kills += 1
        self._gone.add(pid)
        self._bury(pid)

    def in_hand(self, pid: int) -> int:
        """Return how many messages or tasks a process has, or had."""
        try:
            return int(struct.unpack("=q", (self._folder / f"hand-{pid}").read_bytes())[0])
        except (FileNotFoundError, struct.error):
            return 0

    def are_idle(self) -> bool:
        """Tell whether no process has anything in hand."""
        return not any(self.in_hand(pid) for pid in self._alive)

    # -- random moments ----------------------------------------------------------------------------------------------

    def strike(self) -> None:
        """Kill processes that have something in hand, each at a random moment after that."""
        now = time.monotonic()
        for one in list(self._alive.values()):
            if not self.in_hand(one.pid):
                continue
            if one.strikes_at is None:
                one.strikes_at = now + self._left_s(one)
            elif now > one.strikes_at:
                self._kill(one)

    def _left_s(self, one: Alive) -> float:
        longest = one.main and self._pool == "prefork"
        moment_s, overdue_s = (MAIN_MOMENT_S, MAIN_OVERDUE_S) if longest else (MOMENT_S, OVERDUE_S)
        return self._chance.uniform(0, moment_s) + (0 if one.at_moment else overdue_s)

    def _kill(self, one: Alive) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if one.main else os.kill)(one.pid, signal.SIGKILL)
        self.listen()  # it may have come to its point first
        if one.pid in self._alive:
            self._count_kill(one.pid, f"at random: {'the worker' if one.main else 'a pool process'}")
