"""Workers that are killed at random while flows of tasks run, and a count of what the flows have done.

`python -m support.once_storm --help` runs many; see also `scripts/storm_app.py`.
"""

import contextlib
import importlib.util
import json
import os
import random
import signal
import struct
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import redis
from celery import chain, chord
from kombu import Connection, Queue
from sqlalchemy import URL, create_engine, text
from sqlalchemy.pool import NullPool

from celery_alchemy.workers.sending import outbox
from support import preloaded
from support.once_kills import EXPECTED
from support.storm_verdict import Messages, Setup, Verdict
from support.waiting import eventually

TESTS = Path(__file__).resolve().parent.parent
POOLS = {"prefork": 4, "threads": 4, "gevent": 8, "eventlet": 8, "solo": 1, "asyncio": 8}
WAYS = ("with Session(engine)", "lock in Redis", "worker_deduplicate_successful_tasks", "ours", "ours, last")
VISIBLE_AGAIN_S = 1
LONG_S = 1.5
CHANCE, CHEAP_CHANCE = 0.05, 0.1
"""How likely a process dies at each point; a pool process of prefork, which is soon there again, more likely."""
STRIKES_WITHIN_S, STRIKES_MAIN_WITHIN_S = 2.0, 15.0
AT_ONCE = 16
READY_S, END_S, SETTLE_S, STALLED_S = 120, 240, 3.0, 25.0
KNOWN = (
    *("celery_alchemy", "celery_alchemy.workers.starting.bootstep", "celery_alchemy.workers.exactly_once.runner"),
    *("celery_alchemy.workers.exactly_once.backend", "celery_alchemy.workers.sending.outbox", "pymysql"),
    *("sqlalchemy.dialects.mysql.pymysql", "kombu.transport.pyamqp", "celery.bin.worker", "psutil"),
)


class Storm:
    """The director.

    Args:
        places: URLs of the servers: "redis", "rabbitmq", "postgresql", "mariadb".
    """

    def __init__(self, setup: Setup, places: dict[str, str], folder: Path, seed: int, workers: int = 2) -> None:
        self.setup, self.folder = setup, folder
        self._count = workers
        self._chance = random.Random(seed)
        self._places = places
        folder.mkdir(parents=True, exist_ok=True)
        self.prefix = f"storm-{uuid.uuid4().hex[:8]}:"
        self.redis: Any = redis.Redis.from_url(places["redis"], decode_responses=True)
        self.queue = f"{self.prefix}queue"
        self.verdict = Verdict(setup, seed)
        self.log = folder / "log"
        self._events = folder / "events"
        self._events.touch()
        self._workers: list[preloaded.Process] = []
        self.keys: dict[str, tuple[str, str]] = {}
        self._messages: dict[str, list[Any]] = {}
        self._open: dict[str, float] = {}
        self._tends_at = 0.0
        self._strikes_at: dict[int, float] = {}
        self._cheap = setup.pool == "prefork"

    # -- the time of a storm ---------------------------------------------------------------------------------------

    def run(self, kills: int, within_s: float) -> Verdict:
        started = time.monotonic()
        admin = create_engine(self._places[self.setup.database], isolation_level="AUTOCOMMIT", poolclass=NullPool)
        name = self.prefix.strip(":").replace("-", "_")
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        url = admin.url.set(database=name)
        self.engine = create_engine(url, isolation_level="AUTOCOMMIT", pool_size=1)
        try:
            self._configure(url)
            self.module.Base.metadata.create_all(self.engine)
            self._tend()
            eventually(lambda: "ready " in self._events.read_text(), "a worker is ready", within_s=READY_S)
            self._storm(kills, time.monotonic() + within_s)
            self._calm()
            self._judge()
            if self.setup.way.startswith("ours"):
                self._again()
            self.verdict.seconds = round(time.monotonic() - started, 1)
            return self.verdict
        finally:
            for worker in self._workers:
                self._end(worker)
            self._clean()
            self.engine.dispose()
            with admin.connect() as connection:
                force = " WITH (FORCE)" if self.setup.database == "postgresql" else ""
                connection.execute(text(f"DROP DATABASE {name}{force}"))

    def _storm(self, kills: int, until: float) -> None:
        while len(self._struck()) + self.verdict.kills.total() < kills and time.monotonic() < until:
            self._tend()
            if len(self._open) < AT_ONCE:
                self._send(self._chance.choice(list(EXPECTED)))
            self._strike()
            time.sleep(0.02)

    def _strike(self) -> None:
        """Kill processes that have something in hand, each at a random moment after that."""
        now = time.monotonic()
        for worker in self._workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = [one.pid for one in psutil.Process(worker.pid).children()] if self._cheap else []
                for pid in (worker.pid, *children):
                    if not self._in_hand(pid):
                        continue
                    if pid not in self._strikes_at:
                        longest_s = STRIKES_MAIN_WITHIN_S if self._cheap and pid == worker.pid else STRIKES_WITHIN_S
                        self._strikes_at[pid] = now + self._chance.uniform(0, longest_s)
                    elif now > self._strikes_at[pid]:
                        self._kill(pid, whole=pid == worker.pid)

    def _kill(self, pid: int, *, whole: bool) -> None:
        del self._strikes_at[pid]
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if whole else os.kill)(pid, signal.SIGKILL)
        self._note("the worker" if whole else "a pool process", pid)

    def _note(self, what: str, pid: int) -> None:
        if self._in_hand(pid):
            self.verdict.kills[f"at random: {what}"] += 1
        else:
            self.verdict.idle_kills += 1

    def _in_hand(self, pid: int) -> int:
        try:
            return int(struct.unpack("=q", (self.folder / f"hand-{pid}").read_bytes())[0])
        except (FileNotFoundError, struct.error):
            return 0

    # -- workers -----------------------------------------------------------------------------------------------------

    def _configure(self, url: URL) -> None:
        rendered = url.render_as_string(hide_password=False)
        self._on_redis = self.setup.broker == "redis"
        options = {"global_keyprefix": self.prefix, "visibility_timeout": VISIBLE_AGAIN_S, "unacked_mutex_expire": 1}
        settings: dict[str, Any] = {
            "task_default_queue": self.queue,
            "broker_transport_options": options if self._on_redis else {},
            "result_backend_transport_options": {"global_keyprefix": self.prefix},
            "worker_prefetch_multiplier": 1,
            "broker_connection_retry_on_startup": True,
            "worker_deduplicate_successful_tasks": self.setup.way == "worker_deduplicate_successful_tasks",
            "result_extended": True,
            "worker_enable_remote_control": False,  # starts sooner
        }
        if self.setup.way.startswith("ours"):
            settings |= {
                "alchemy_database_url": rendered,
                "alchemy_exactly_once": "last" if self.setup.way.endswith("last") else "first",
                "alchemy_outbox": True,
                "alchemy_outbox_resend_s": LONG_S + 2 * VISIBLE_AGAIN_S,
            }
            if self.setup.results == "alchemy":
                settings |= {"task_acks_late": True, "task_reject_on_worker_lost": True}
        self._config = {
            "way": self.setup.way, "database": rendered, "prefix": self.prefix, "folder": str(self.folder),
            "broker": self._kombu(self._places[self.setup.broker]), "redis": self._places["redis"],
            "backend": "alchemy://" if self.setup.results == "alchemy" else self._kombu(self._places["redis"]),
            "settings": settings, "chance": CHEAP_CHANCE if self._cheap else CHANCE, "worker": False,
        }  # fmt: skip
        os.environ["STORM_APP"] = json.dumps(self._config)
        spec = importlib.util.spec_from_file_location(f"storm_{uuid.uuid4().hex}", TESTS / "scripts" / "storm_app.py")
        assert spec is not None
        assert spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        sys.modules[self.module.__name__] = self.module
        spec.loader.exec_module(self.module)
        self.app = self.module.app

    @staticmethod
    def _kombu(url: str) -> str:
        return url.replace("unix://", "redis+socket://").replace("?db=", "?virtual_host=")

    def _start(self) -> None:
        pool = self.setup.pool
        command = [sys.executable, "-m", "celery", "-A", "scripts.storm_app", "worker", "-P", pool]
        command += ["-c", str(POOLS[pool]), "-l", "INFO", "-n", f"{uuid.uuid4().hex[:8]}@here"]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        environment = {**os.environ, "STORM_APP": json.dumps({**self._config, "worker": True})}
        environment |= {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "PYTHONFAULTHANDLER": "1"}
        library = preloaded.library_of(command)
        interpreter = preloaded._running.get(library)
        if interpreter is None:
            interpreter = preloaded._running[library] = preloaded.Interpreter(library, *KNOWN)
        self._workers.append(preloaded.start(command, TESTS, self.log, environment))

    def _end(self, worker: preloaded.Process) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait(10)

    def _tend(self) -> None:
        """Start the workers that were killed; let the broker deliver again what they had; see which flows are done."""
        if time.monotonic() < self._tends_at:
            return
        self._tends_at = time.monotonic() + 0.2
        for worker in [one for one in self._workers if one.poll() is not None]:
            self._end(worker)
            self._workers.remove(worker)
        while len(self._workers) < self._count:
            self._start()
        if self.setup.way.startswith("ours"):
            # A lease of a minute is over; whoever has it may still send. What waits for its receiver is let alone.
            with self.engine.connect() as connection:
                leased = f"sends = 0 AND due_at > {time.time() + LONG_S + 2 * VISIBLE_AGAIN_S}"
                connection.execute(text(f"UPDATE celery_alchemy_outbox SET due_at = 0 WHERE {leased}"))
            outbox.send_waiting(self.module.db)
        if self._on_redis:
            with self.app.connection_for_write() as connection:
                connection.default_channel.qos.restore_visible(interval=0)
        self._look()

    def _look(self) -> None:
        if self._open:
            found = self._traces(self._open)
            now = time.monotonic()
            for key, since in list(self._open.items()):
                if set(EXPECTED[self.keys[key][0]]) <= set(found.get(key, ())) or now - since > STALLED_S:
                    del self._open[key]

    # -- flows -------------------------------------------------------------------------------------------------------

    def _pause_s(self) -> float:
        return self._chance.choice([0.0, 0.0, self._chance.uniform(0, 0.1)])

    def _send(self, kind: str) -> None:
        key, step = uuid.uuid4().hex, self.module.step
        link = step.s(key, "link")
        if kind == "chain":
            first = LONG_S if self._chance.random() < 0.1 else self._pause_s()
            canvas = chain(
                step.s(None, key, "a", first), step.s(key, "b", self._pause_s()), step.s(key, "c").set(link=[link])
            )
        elif kind == "chord":
            canvas = chord(
                [step.s(None, key, f"m{number}", self._pause_s()) for number in range(3)], step.s(key, "body")
            )
        else:
            name, note = {"replace": ("replaced", "r"), "retry": ("retried", "t"), "follow": ("follows", "f")}[kind]
            canvas = self.app.tasks[name].s(None, key, note, self._pause_s()).set(task_id=str(uuid.uuid4()))
            if kind != "follow":
                canvas = canvas.set(link=[link])
        original, kept = self.app.send_task, self._messages.setdefault(key, [])

        def send_task(name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            own = {name: value for name, value in options.items() if name not in {"producer", "connection"}}
            kept.append((name, args, kwargs, own))
            return original(name, args, kwargs, **options)

        self.app.send_task = send_task
        try:
            result = canvas.apply_async()
        finally:
            self.app.send_task = original
        self.keys[key] = (kind, result.id)
        self._open[key] = time.monotonic()

    def _send_again(self, keys: Iterable[str]) -> None:
        for key in keys:
            for name, args, kwargs, options in self._messages[key]:
                self.app.send_task(name, args, kwargs, **options)

    def _traces(self, keys: Iterable[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        known = set(keys)
        with self.engine.connect() as connection:
            if len(known) < 200:
                names = ", ".join(f"'{key}'" for key in known)
                rows = connection.execute(text(f"SELECT key_, note FROM effects WHERE key_ IN ({names})"))
            else:
                rows = connection.execute(text("SELECT key_, note FROM effects"))
            for key, note in rows:
                if key in known:
                    found.setdefault(key, []).append(note)
        return found

    # -- the end -----------------------------------------------------------------------------------------------------

    def _calm(self) -> None:
        """Kill nothing more, and wait until nothing happens any more."""
        (self.folder / "calm").touch()
        self._settle()
        self.verdict.settled = self._waiting() == 0

    def _settle(self) -> None:
        with contextlib.suppress(AssertionError):
            eventually(self._is_quiet, "nothing waits any more", within_s=END_S)

    def _is_quiet(self) -> bool:
        before = self._events.stat().st_size
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            self._tend()
            time.sleep(0.1)
        return self._events.stat().st_size == before and self._waiting() == 0

    def _waiting(self) -> int:
        """Return how many messages the broker has."""
        if self._on_redis:
            return int(self.redis.llen(self.prefix + self.queue)) + int(self.redis.hlen(self.prefix + "unacked"))
        with Connection(self._config["broker"]) as connection, connection.channel() as channel:
            return int(Queue(self.queue, channel=channel).queue_declare(passive=True).message_count)

    def _said(self) -> list[list[str]]:
        return [line.split(" ", 2) for line in self._events.read_text().splitlines()]

    def _struck(self) -> list[str]:
        """Return where processes have killed themselves."""
        return [words[2] for words in self._said() if words[0] == "killed"]

    def _judge(self) -> None:
        verdict = self.verdict
        verdict.kills.update(f"at a point: {one}" for one in self._struck())
        messages = Messages.of(self._said())
        found = self._traces(self.keys)
        for key, (kind, task_id) in self.keys.items():
            result = self.app.AsyncResult(task_id)
            verdict.judge(key, kind, found.get(key, ()), messages.gone(key), (result.state, result.result))
        log = self.log.read_text(errors="replace")
        verdict.failures = log.count(" raised unexpected")
        verdict.deliveries = log.count(" received\n")

    def _again(self) -> None:
        """Kill everything, send everything again with the same ids, and count once more."""
        verdict = self.verdict
        verdict.again = True
        for worker in self._workers:
            self._end(worker)
        self._workers.clear()
        self._send_again(self.keys)
        self._settle()
        found = self._traces(self.keys)
        for key, (kind, _) in self.keys.items():
            verdict.judge_again(key, kind, found.get(key, ()))

    def _clean(self) -> None:
        if self.setup.way.startswith("ours"):
            self.module.db.stop()
        if not self._on_redis:
            with Connection(self._config["broker"]) as connection, connection.channel() as channel:
                Queue(self.queue, channel=channel).delete()
        self.app.close()
        keys = list(self.redis.scan_iter(f"{self.prefix}*", count=1000))
        if keys:
            self.redis.delete(*keys)
        self.redis.close()
