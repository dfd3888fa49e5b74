"""Workers that are killed while flows of tasks run, and a count of what the flows have done.

`make storms` runs many: `scripts/once_storms.py`. The workers are those of `support.storm_workers`, the flows those of
`support.storm_flows`, the app is `scripts/storm_app.py`; here is the time of a storm.
"""

import contextlib
import importlib.util
import json
import os
import random
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import redis
from kombu import Queue
from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from celery_alchemy.workers.sending import outbox
from support.storm_flows import LONG_S, Flows
from support.storm_verdict import Setup, Verdict
from support.storm_workers import TESTS, Workers
from support.waiting import eventually

WAYS = ("with Session(engine)", "lock in Redis", "worker_deduplicate_successful_tasks", "ours", "ours, last")
VISIBLE_AGAIN_S = 1
RESEND_S = LONG_S + 2 * VISIBLE_AGAIN_S
FLOWS_FOR_EACH_WORKER = 8
TICK_S, DELIVERS_EVERY_S, LOOKS_EVERY_S = 0.02, 0.25, 0.2
READY_S, END_S, QUIET_S = 120, 150, 1.0
HURRIES_EVERY_S = 3.0
"""When nothing is killed any more, the outbox need not wait longer than that before it sends again."""
ASYNC_DRIVERS = {"postgresql": "postgresql+psycopg", "mariadb": "mysql+asyncmy"}


class Storm:
    """The director.

    Args:
        places: URLs of the servers: "redis", "rabbitmq", "postgresql", "mariadb".
        workers: So many at a time.
    """

    def __init__(self, setup: Setup, places: dict[str, str], folder: Path, seed: int, workers: int = 3) -> None:
        self.setup, self.folder = setup, folder
        self._count, self._chance, self._places = workers, random.Random(seed), places
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "events").touch()
        self.prefix = f"storm-{uuid.uuid4().hex[:8]}:"
        self.redis: Any = redis.Redis.from_url(places["redis"], decode_responses=True)
        self.queue = f"{self.prefix}queue"
        self.verdict = Verdict(setup, seed)
        self._ours, self._on_redis = setup.way.startswith("ours"), setup.broker == "redis"
        self._delivers_at = self._looks_at = self._hurries_at = 0.0
        self._calms = False
        self._broker: Any = None

    # -- the time of a storm ---------------------------------------------------------------------------------------

    def run(self, kills: int, within_s: float) -> Verdict:
        started, verdict = time.monotonic(), self.verdict
        with contextlib.ExitStack() as stack:
            url = self._database(stack)
            self._configure(url)
            self.module.Base.metadata.create_all(self.engine)
            self.workers = Workers(self.setup, self._config, self.folder, self._count, self._chance)
            self.flows = Flows(self.setup, self.module, self.engine, self._chance)
            for end in (self._clean, self.flows.close, self.workers.close):
                stack.callback(end)
            eventually(self._is_ready, "a worker is ready", within_s=READY_S)
            self._took(started, "start")
            self._storm(kills, time.monotonic() + within_s)
            self._took(started, "storm")
            self._calm()
            self.flows.judge(verdict, self.workers.messages)
            self._read_log()
            self._took(started, "calm")
            if self._ours:
                self._again()
                self._took(started, "again")
            verdict.kills, verdict.idle_kills = self.workers.kills, self.workers.idle_kills
            verdict.seconds = round(time.monotonic() - started, 1)
        return verdict

    def _took(self, started: float, phase: str) -> None:
        took = self.verdict.phases
        took[phase] = round(time.monotonic() - started - sum(took.values()), 1)

    def _is_ready(self) -> bool:
        self.workers.tend()
        return self.workers.ready > 0

    def _storm(self, kills: int, until: float) -> None:
        while self.workers.kills.total() < kills and time.monotonic() < until:
            self._tend()
            if len(self.flows.open) < FLOWS_FOR_EACH_WORKER * self._count:
                self.flows.send()
            self.workers.strike()
            time.sleep(self._chance.uniform(0.5, 1.5) * TICK_S)

    def _tend(self) -> None:
        """Start workers; let the broker deliver again what the dead had; see which flows are done."""
        self.workers.tend()
        now = time.monotonic()
        if now >= self._delivers_at:
            self._delivers_at = now + DELIVERS_EVERY_S
            self._deliver()
        if now >= self._looks_at:
            self._looks_at = now + LOOKS_EVERY_S
            self.flows.look()

    def _deliver(self) -> None:
        if self._ours:
            # A lease of a minute is over; whoever has it may still send. What waits for its receiver is let alone.
            self._due("sends = 0 AND due_at > :later")
            outbox.send_waiting(self.module.db)
        if self._on_redis:
            self._channel().qos.restore_visible(interval=0)

    def _due(self, where: str) -> None:
        sql = f"UPDATE celery_alchemy_outbox SET due_at = 0 WHERE {where}"
        # It is done again soon, and is no part of what is tested: a deadlock with a sender does not end the storm.
        with contextlib.suppress(OperationalError), self.engine.connect() as connection:
            connection.execute(text(sql), {"later": time.time() + RESEND_S})

    def _channel(self) -> Any:
        if self._broker is None:
            self._broker = self.app.connection_for_write()
        return self._broker.default_channel

    # -- the end -----------------------------------------------------------------------------------------------------

    def _calm(self) -> None:
        """Kill nothing more, and wait until nothing happens any more."""
        self._calms = True
        (self.folder / "calm").touch()
        self.verdict.settled = self._settle()

    def _settle(self) -> bool:
        """Wait until the brokers and the outbox have nothing more; tell whether that came to be."""
        until, quiet_since, size = time.monotonic() + END_S, time.monotonic(), 0
        while time.monotonic() < until:
            self._tend()
            time.sleep(0.1)
            if not (self.workers.are_idle() and self._waiting() == 0 and self._is_sent()):
                quiet_since = time.monotonic()
            if size != (size := self.workers.events.stat().st_size):
                quiet_since = time.monotonic()
            if time.monotonic() - quiet_since > QUIET_S:
                return True
        return False

    def _is_sent(self) -> bool:
        """Tell whether the outbox has nothing more: nothing to send, and nothing whose receiver has not completed."""
        if not self._ours:
            return True
        if time.monotonic() >= self._hurries_at:
            self._hurries_at = time.monotonic() + HURRIES_EVERY_S
            self._due("due_at IS NOT NULL")
        with self.engine.connect() as connection:
            waiting = text("SELECT count(*) FROM celery_alchemy_outbox WHERE due_at IS NOT NULL")
            return connection.execute(waiting).scalar_one() == 0

    def _waiting(self) -> int:
        """Return how many messages the broker has."""
        if self._on_redis:
            return int(self.redis.llen(self.prefix + self.queue)) + int(self.redis.hlen(self.prefix + "unacked"))
        queue = Queue(self.queue, channel=self._channel())
        return int(queue.queue_declare(passive=True).message_count)

    def _read_log(self) -> None:
        log = self.workers.log.read_text(errors="replace")
        self.verdict.failures = log.count(" raised unexpected")
        self.verdict.deliveries = log.count(" received\n")
        self.verdict.set_aside = log.count("is set aside in the outbox")

    def _again(self) -> None:
        """Kill everything, send everything again with the same ids, and count once more."""
        self.verdict.again = True
        self.workers.end()
        self.flows.send_again()
        self.verdict.settled &= self._settle()
        self.flows.judge_again(self.verdict)

    def _clean(self) -> None:
        if self._ours:
            self.module.db.stop()
        if not self._on_redis:
            Queue(self.queue, channel=self._channel()).delete()
        if self._broker is not None:
            self._broker.release()
        client = getattr(self.app.backend, "client", None)  # of Redis
        if client is not None:
            client.connection_pool.disconnect()
        self.app.close()
        keys = list(self.redis.scan_iter(f"{self.prefix}*", count=1000))
        if keys:
            self.redis.delete(*keys)
        self.redis.close()

    # -- the app -----------------------------------------------------------------------------------------------------

    def _database(self, stack: contextlib.ExitStack) -> URL:
        """Return the URL of a database that is dropped in the end."""
        admin = create_engine(self._places[self.setup.database], isolation_level="AUTOCOMMIT", poolclass=NullPool)
        name = self.prefix.strip(":").replace("-", "_")
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))

        def drop() -> None:
            self.engine.dispose()
            with admin.connect() as connection:
                force = " WITH (FORCE)" if self.setup.database == "postgresql" else ""
                connection.execute(text(f"DROP DATABASE {name}{force}"))

        url = admin.url.set(database=name)
        self.engine = create_engine(url, isolation_level="AUTOCOMMIT", pool_size=1)
        stack.callback(drop)
        return url

    def _settings(self) -> dict[str, Any]:
        setup = self.setup
        options = {"global_keyprefix": self.prefix, "visibility_timeout": VISIBLE_AGAIN_S, "unacked_mutex_expire": 1}
        settings: dict[str, Any] = {
            "task_default_queue": self.queue,
            "broker_transport_options": options if self._on_redis else {},
            "result_backend_transport_options": {"global_keyprefix": self.prefix},
            "worker_prefetch_multiplier": 1,
            "broker_connection_retry_on_startup": True,
            "worker_deduplicate_successful_tasks": setup.way == "worker_deduplicate_successful_tasks",
            "result_extended": True,
            "worker_enable_remote_control": False,  # starts sooner
        }
        if self._ours:
            settings |= {
                "alchemy_exactly_once": "last" if setup.way.endswith("last") else "first",
                "alchemy_outbox": True,
                "alchemy_outbox_resend_s": RESEND_S,
            }
            if setup.database == "postgresql":
                settings["alchemy_begin_with_first_statement"] = setup.begins == "along"
            if setup.results == "alchemy":
                settings |= {"task_acks_late": True, "task_reject_on_worker_lost": True}
        return settings

    def _configure(self, url: URL) -> None:
        driver = ASYNC_DRIVERS[self.setup.database] if self.setup.tasks == "async def" else url.drivername
        own = url.set(drivername=driver)
        self._config = {
            "way": self.setup.way, "tasks": self.setup.tasks, "pool": self.setup.pool, "results": self.setup.results,
            "database": own.render_as_string(hide_password=False), "prefix": self.prefix, "folder": str(self.folder),
            "broker": self._kombu(self._places[self.setup.broker]), "redis": self._places["redis"],
            "backend": "alchemy://" if self.setup.results == "alchemy" else self._kombu(self._places["redis"]),
            "settings": self._settings(), "worker": False,
        }  # fmt: skip
        # The director waits for nothing: it has a driver of the ordinary kind.
        ordinary = make_url(url).render_as_string(hide_password=False)
        os.environ["STORM_APP"] = json.dumps({**self._config, "database": ordinary, "tasks": "def"})
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
