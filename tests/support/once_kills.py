"""Flows of tasks with exactly_once, and workers that are killed at named points meanwhile."""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from celery import chain, chord
from sqlalchemy import text

from celery_alchemy.workers.sending import outbox
from support.databases import Database
from support.waiting import eventually
from support.worker import TESTS, Site

POINTS = tuple(
    f"{when} {what}"
    for what in ("COMMIT", "publish", "result", "count", "done", "acknowledged")
    for when in ("before", "after")
)
EXPECTED = {
    "chain": ["None>a", "a>b", "b>c", "c>link"],
    "chord": ["None>m0", "None>m1", "None>m2", "m0,m1,m2>body"],
    "replace": ["None>r", "r>r+", "r+>link"],
    "retry": ["None>t", "t>link"],
    "follow": ["None>f", "f>f+"],
}
#: What ends with errbacks: not for storms, whose app has no such tasks.
FAILING = {
    "failing": ["failed>errback", "failed>other"],
    "failing chord": ["None>m0", "None>m1", "None>m2", "failed>errback", "failed>other"],
}
DUE = {**EXPECTED, **FAILING}
READY_S, DONE_S = 120, 15


class Kills:
    """An app, its worker, and the flows that are sent."""

    def __init__(self, site: Site, database: Database, pool: str, broker: str, **settings: Any) -> None:
        self.database, self.pool, self._site = database, pool, site
        self.prefix = f"{site.prefix}{uuid.uuid4().hex[:6]}:"
        self.redis: Any = redis.Redis.from_url(site.urls.client, decode_responses=True, socket_timeout=None)
        options = {"global_keyprefix": self.prefix, "visibility_timeout": 1, "unacked_mutex_expire": 1}
        self._config: dict[str, Any] = {
            "broker": broker or site.urls.celery,
            "backend": settings.pop("result_backend", site.urls.celery),
            "redis": site.urls.client,
            "prefix": self.prefix,
            "awaits": settings.pop("awaits", False),
            "late": settings.pop("late", True),
            "pause_s": settings.pop("pause_s", None),
            "settings": {
                "task_default_queue": f"{self.prefix}queue",
                "broker_transport_options": {} if broker else options,
                "result_backend_transport_options": {"global_keyprefix": self.prefix},
                "worker_prefetch_multiplier": 1,
                "broker_connection_retry_on_startup": True,
                "alchemy_database_url": database.url("kills"),
                **settings,
            },
        }
        self.log = site.folder / f"kills-{uuid.uuid4().hex[:6]}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.module = self._load()
        self.app = self.module.app
        self.messages: dict[str, list[Any]] = {}

    def _load(self) -> Any:
        os.environ["ONCE_APP"] = json.dumps({**self._config, "worker": False})
        spec = importlib.util.spec_from_file_location(f"once_{uuid.uuid4().hex}", TESTS / "scripts" / "once_app.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
        return module

    # -- the worker --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a worker, and wait until it is ready."""
        self.redis.delete(self.prefix + "ready")
        command = [sys.executable, "-m", "celery", "-A", "once_app", "worker", "-P", self.pool, "-c", "2"]
        command += ["-l", "INFO", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        environment = {**os.environ, "ONCE_APP": json.dumps({**self._config, "worker": True})}
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS / "scripts"), str(TESTS)])
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=TESTS / "scripts", start_new_session=True
            )
        assert self.redis.blpop([self.prefix + "ready"], timeout=READY_S) is not None, self.tail()

    def keep_up(self) -> None:
        """Start the worker again where it was killed; let the broker deliver again what that had in hand."""
        assert self._process is not None
        if self._process.poll() is not None:
            self._kill_group()
            self.start()
        if self._config["settings"].get("alchemy_outbox"):
            # A lease of a minute is over; whoever has it may still send.
            self.database.execute("UPDATE celery_alchemy_outbox SET due_at = 0 WHERE due_at IS NOT NULL AND sends = 0")
            outbox.send_waiting(self.module.db)
        if self._config["broker"].startswith("redis"):
            with self.app.connection_for_write() as connection:
                connection.default_channel.qos.restore_visible(interval=0)

    def lose_messages(self) -> None:
        """Let Redis forget what waits in the queue, and what a worker has in hand."""
        self.redis.delete(*(f"{self.prefix}{name}" for name in (f"{self.prefix}queue", "unacked", "unacked_index")))

    def _kill_group(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def end(self, number: int) -> int:
        """Send the worker a signal; return its exit code."""
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(READY_S)

    def stop(self) -> None:
        if self._process is not None:
            self._kill_group()
        self.module.db.stop()
        self.app.close()
        keys = list(self.redis.scan_iter(f"{self.prefix}*", count=1000))
        if keys:
            self.redis.delete(*keys)
        self.redis.close()

    def tail(self) -> str:
        return "\n".join(Path(self.log).read_text(errors="replace").splitlines()[-40:])

    # -- flows -------------------------------------------------------------------------------------------------------

    def send(self, kind: str, *, by_outbox: bool = False) -> str:
        """Send a flow; return its key.

        Args:
            by_outbox: With the COMMIT of a transaction.
        """
        key = uuid.uuid4().hex
        step = self.module.step
        link = step.s(key, "link")
        if kind == "chain":
            canvas = chain(step.s(None, key, "a"), step.s(key, "b"), step.s(key, "c").set(link=[link]))
        elif kind == "chord":
            canvas = chord([step.s(None, key, f"m{number}") for number in range(3)], step.s(key, "body"))
        elif kind in FAILING:
            errbacks = [self.module.mourns.s(key, name) for name in ("errback", "other")]
            canvas = self.module.fails.s(None, key, "f")
            if kind == "failing chord":
                members = [step.s(None, key, f"m{number}") for number in range(3)]
                canvas = chord([*members, canvas], step.s(key, "body").set(link_error=errbacks))
            else:
                canvas = canvas.set(link_error=errbacks, task_id=str(uuid.uuid4()))
        else:
            name, note = {"replace": ("replaced", "r"), "retry": ("retried", "t"), "follow": ("follows", "f")}[kind]
            canvas = self.app.tasks[name].s(None, key, note).set(task_id=str(uuid.uuid4()))
            if kind != "follow":
                canvas = canvas.set(link=[link])
        if by_outbox:
            self._send_with_commit(canvas)
            return key
        with self._captured(key):
            canvas.apply_async()
        return key

    def _send_with_commit(self, canvas: Any) -> None:
        db = self.module.db
        if not self._config["awaits"]:
            with db.unit_of_work():
                db.delay_on_commit(canvas)
            return

        async def send() -> None:
            async with db.async_unit_of_work():
                db.delay_on_commit(canvas)
            await db.async_engine.dispose()

        asyncio.run(send())

    @contextlib.contextmanager
    def _captured(self, key: str) -> Iterator[None]:
        """Remember what is sent in the block, to be sent again with the same ids."""
        original, found = self.app.send_task, self.messages.setdefault(key, [])

        def send_task(name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            kept = {name: value for name, value in options.items() if name not in {"producer", "connection"}}
            found.append((name, args, kwargs, kept))
            return original(name, args, kwargs, **options)

        self.app.send_task = send_task
        try:
            yield
        finally:
            self.app.send_task = original

    def send_again(self, key: str) -> None:
        for name, args, kwargs, options in self.messages[key]:
            self.app.send_task(name, args, kwargs, **options)

    def traces(self, key: str) -> list[str]:
        return sorted(self.database.rows(key))

    def is_done(self, key: str, kind: str) -> bool:
        return set(self.traces(key)) >= set(DUE[kind])

    def run(
        self, kind: str, point: str, times: int = 1, within_s: float = DONE_S, *, by_outbox: bool = False
    ) -> tuple[str, bool]:
        """Send a flow while the worker dies at `point` up to so many times; return its key, and whether it was done
        without being sent again."""
        self.redis.set(self.prefix + "plan:" + point, times)
        key = self.send(kind, by_outbox=by_outbox)
        until = time.monotonic() + within_s
        while not self.is_done(key, kind) and time.monotonic() < until:
            time.sleep(0.2)
            self.keep_up()
        self.redis.delete(self.prefix + "plan:" + point)
        return key, self.is_done(key, kind)

    def settle(self, keys: dict[str, str]) -> dict[str, list[str]]:
        """Let everything come to its end, sent again where something is missing, and then all of it; return what was
        done twice, or never."""
        self.keep_up()
        for key, kind in keys.items():
            if not self.is_done(key, kind):
                self.send_again(key)
        eventually(lambda: self._all_done(keys), "all flows are done", within_s=60)
        for key in keys:
            self.send_again(key)
        eventually(self._is_idle, "nothing waits any more", within_s=60)
        return {key: self.traces(key) for key, kind in keys.items() if self.traces(key) != sorted(DUE[kind])}

    def _all_done(self, keys: dict[str, str]) -> bool:
        self.keep_up()
        return all(self.is_done(key, kind) for key, kind in keys.items())

    def _is_idle(self) -> bool:
        """Tell whether the log has said nothing new for two seconds."""
        self.keep_up()
        before = self.log.stat().st_size
        time.sleep(2)
        return self.log.stat().st_size == before

    def killed(self) -> int:
        return int(self.redis.get(self.prefix + "killed") or 0)

    def wait_for_kill(self, before: int, point: str) -> None:
        """Wait until one more was killed than `before`: what it was to do may be done first."""
        eventually(lambda: self.killed() == before + 1, f"a kill {point}")

    def said(self, words: str) -> int:
        """Return how often the worker has logged these words."""
        return Path(self.log).read_text(errors="replace").count(words)

    def failures(self) -> list[str]:
        text_ = Path(self.log).read_text(errors="replace")
        return [line for line in text_.splitlines() if " raised unexpected" in line]


def count(odd: dict[str, list[str]], keys: dict[str, str]) -> tuple[int, int]:
    """Return how many effects were there twice, and how many were lost."""
    twice = lost = 0
    for key, traces in odd.items():
        found, due = Counter(traces), Counter(DUE[keys[key]])
        twice += sum((found - due).values())
        lost += sum((due - found).values())
    return twice, lost


__all__ = ["DUE", "EXPECTED", "FAILING", "POINTS", "Kills", "count", "text"]
