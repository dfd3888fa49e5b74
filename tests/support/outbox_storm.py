"""An outbox in a storm: web-like processes, a worker and senders are killed while the broker and the database fail.

Afterwards the database says which transactions were committed, a second queue of the broker what arrived there and in
which order, and the worker what it ran.
"""

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kombu import Connection, Exchange, Queue
from sqlalchemy.exc import DBAPIError

from support import forking, outbox_plans
from support.databases import Database, MariaDB
from support.outbox_brokers import BrokerPlace, Pushed
from support.waiting import eventually

#: How many of each role there are, and how long each lives: seconds, at least and at most.
ROLES = {"web": (3, 0.3, 4.0), "worker": (1, 2.0, 12.0), "sender": (2, 0.3, 4.0)}
FAULT_EVERY_S = (0.2, 1.0)
OUTAGE_S = (0.3, 1.5)
LEASE_S = 10.0
DRAIN_S = 120.0
RECEIVE_S = 40.0
NUMBERS_OF_A_PROCESS = 10_000


@dataclass
class Verdict:
    """What came of it."""

    begun: int = 0
    committed: int = 0
    undone: int = 0
    """Rolled back as planned."""
    interrupted: int = 0
    """Begun by a process that was killed before it knew how they ended."""
    failed: int = 0
    """Ended with an error: the database was away, or the connection was cut."""
    messages: int = 0
    """Of committed transactions."""
    repeats: int = 0
    """Messages that came to the broker again."""
    run_again: int = 0
    """Messages that the worker ran again, those that the broker delivered twice among them."""
    faults: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    """Of transactions that failed."""
    lost: list[str] = field(default_factory=list)
    ghosts: list[str] = field(default_factory=list)
    """Messages that nobody committed."""
    wrong_ids: list[str] = field(default_factory=list)
    order_broken: list[str] = field(default_factory=list)
    """Transactions whose messages did not come first in their order, and all arrivals of them."""
    lost_in_transport: list[str] = field(default_factory=list)
    """Messages that were in the worker's queue and that no worker got."""
    gave_up: Counter[str] = field(default_factory=Counter)
    """Senders and workers that ended by themselves, with their exit code."""
    ended: dict[str, int] = field(default_factory=dict)
    """The exit codes after a SIGTERM at the end."""
    seconds: float = 0.0

    def __str__(self) -> str:
        return ", ".join(f"{name} {dict(v) if isinstance(v, Counter) else v}" for name, v in vars(self).items())


class Storm:
    """The director: it starts the processes, and lets things happen to them.

    Args:
        restart: Stops the database's server, or lets it crash, and starts it again; None: it is not ours.
        settings: Of the app, more than the storm's own.
    """

    def __init__(
        self,
        folder: Path,
        database: Database,
        broker: BrokerPlace,
        *,
        key: str,
        seed: int,
        restart: Callable[[random.Random], str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder, self._database, self._broker, self._key, self._seed = folder, database, broker, key, seed
        self._restart = restart
        self._settings = {"broker_transport_options": broker.options, "alchemy_outbox": True, **(settings or {})}
        self._chance = random.Random(seed)
        self._name = f"storm-{key[:12]}"
        self._exchange = Exchange(f"{self._name}-x", type="topic")
        self._queue, self._tap = (Queue(f"{self._name}{n}", self._exchange, routing_key="storm") for n in ("", "-tap"))
        self._slots: dict[tuple[str, int], tuple[int, float]] = {}
        self._webs = 0
        self._faults_at = self._recovers_at = 0.0
        self._recover: Callable[[], object] | None = None
        self._pushed: Pushed | None = None
        self.verdict = Verdict()

    def run(self, count: int, within_s: float) -> Verdict:
        """Do `count` transactions, then let everything arrive, and judge."""
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            self._proxy = stack.enter_context(
                forking.script("broker_proxy", self._folder / "proxy.log", **self._broker.proxy)
            )
            port = self._proxy.ask(do="port")
            self._declare()
            stack.callback(self._delete)
            if self._broker.pid is not None:
                self._pushed = stack.enter_context(Pushed(self._broker.proxy["socket"], self._queue.name))
            self._forker = stack.enter_context(self._started_forker(self._broker.through(port)))
            stack.callback(self._be_well)
            deadline = started + within_s
            self._faults_at = started + 1
            while self._done() < count:
                assert time.monotonic() < deadline, f"{self._done()} transactions in {within_s} s\n{self._log()}"
                self._tend(killing=True)
                self._storm()
                time.sleep(0.004)
            self._let_arrive()
            tapped = self._tapped()
            (self._folder / "tapped").write_text("".join(f"{n} {place} {id}\n" for n, place, id in tapped))
            if self._pushed is not None:
                self._pushed.complete()
            self._judge(tapped)
        self.verdict.seconds = round(time.monotonic() - started, 1)
        return self.verdict

    # -- processes ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _started_forker(self, broker_url: str) -> Iterator[forking.Script]:
        shop = {
            "url": self._database.url("storm"), "broker": broker_url, "queue": self._queue.name, "key": self._key,
            "exchange": self._exchange.name, "seed": self._seed, "settings": self._settings,
            "lease_s": LEASE_S,
            "received": str(self._folder / "received"), "progress": str(self._folder / "progress"),
        }  # fmt: skip
        for file in ("received", "progress"):
            Path(shop[file]).touch()
        os.environ["OUTBOX_SHOP"] = json.dumps(shop)
        try:
            with forking.script("outbox_forker", self._folder / "storm.log") as script:
                yield script
        finally:
            del os.environ["OUTBOX_SHOP"]

    def _start(self, role: str, place: int) -> None:
        _, shortest, longest = ROLES[role]
        arguments = []
        if role == "web":
            arguments = [self._webs * NUMBERS_OF_A_PROCESS, NUMBERS_OF_A_PROCESS]
            self._webs += 1
        pid = self._forker.ask(fork=role, arguments=arguments)
        self._slots[role, place] = (pid, time.monotonic() + self._chance.uniform(shortest, longest))

    def _tend(self, *, killing: bool, roles: tuple[str, ...] = tuple(ROLES)) -> None:
        """Start what is not running, and kill whose time has come."""
        now = time.monotonic()
        for role in roles:
            for place in range(ROLES[role][0]):
                if (role, place) not in self._slots:
                    self._start(role, place)
                    continue
                pid, dies_at = self._slots[role, place]
                code = self._forker.ask(poll=pid)
                if code is not None:
                    self.verdict.gave_up[f"{role}: {code}"] += 1
                    self._start(role, place)
                elif killing and now > dies_at:
                    self._end(role, place, signal.SIGKILL)
                    self.verdict.faults[f"{role} killed"] += 1
                    self._start(role, place)

    def _end(self, role: str, place: int, number: int, within_s: float = 30) -> int:
        pid, _ = self._slots.pop((role, place))
        os.kill(pid, number)
        code: list[int | None] = [None]

        def ended() -> bool:
            code[0] = self._forker.ask(poll=pid)
            return code[0] is not None

        eventually(ended, f"{role} ends with signal {number}\n{self._log()}", within_s=within_s)
        return int(code[0] or 0)

    # -- faults ------------------------------------------------------------------------------------------------------

    def _storm(self) -> None:
        now = time.monotonic()
        if self._recover is not None and now > self._recovers_at:
            self._be_well()
        if now < self._faults_at or self._recover is not None:
            return
        self._faults_at = now + self._chance.uniform(*FAULT_EVERY_S)
        faults = ["cut"] * 4 + ["stall"] * 2 + ["refuse"] * 2 + ["terminate"] * 4 + ["restart"] * bool(self._restart)
        fault = self._chance.choice(faults)
        if fault == "restart":
            assert self._restart is not None
            self._database.engine.dispose()
            self.verdict.faults[f"database {self._restart(self._chance)}"] += 1
        elif fault == "terminate":
            self.verdict.faults["database connections ended"] += self._terminate()
        elif fault == "cut":
            self.verdict.faults["broker connections cut"] += self._proxy.ask(do="cut")
        else:
            self._recovers_at = now + self._chance.uniform(*OUTAGE_S)
            self.verdict.faults[f"broker {'stalled' if fault == 'stall' else 'away'}"] += 1
            self._stall() if fault == "stall" else self._refuse()

    def _stall(self) -> None:
        pid = self._broker.pid or self._proxy._process.pid
        os.kill(pid, signal.SIGSTOP)
        self._recover = lambda: os.kill(pid, signal.SIGCONT)

    def _refuse(self) -> None:
        self._proxy.ask(do="refuse")
        self._proxy.ask(do="cut")
        self._recover = lambda: self._proxy.ask(do="recover")

    def _be_well(self) -> None:
        recover, self._recover = self._recover, None
        if recover is not None:
            recover()

    def _terminate(self) -> int:
        """End the connections to the database that are there; those of this test are left alone."""
        try:
            if isinstance(self._database, MariaDB):
                ended = 0
                for one in self._database.connections("storm"):
                    with contextlib.suppress(DBAPIError):  # it has gone by itself
                        self._database.execute(f"KILL {one.pid}")
                        ended += 1
                return ended
            sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'storm'"
            return int(self._database.column(sql)[0])
        except DBAPIError:
            return 0

    # -- the broker's queues -----------------------------------------------------------------------------------------

    def _declare(self) -> None:
        with Connection(self._broker.url) as connection, connection.channel() as channel:
            for queue in (self._queue, self._tap):
                queue(channel).declare()

    def _delete(self) -> None:
        with Connection(self._broker.url) as connection, connection.channel() as channel:
            for queue in (self._queue, self._tap):
                queue(channel).delete()
            self._exchange(channel).delete()

    def _tapped(self) -> list[tuple[int, int, str]]:
        """Return what has come to the broker: transaction, place, id.

        What kombu's Redis transport gives back of a worker that was killed, it puts into each queue of the exchange, at
        its front: that is marked, and left out.
        """
        found = []
        with Connection(self._broker.url) as connection, connection.channel() as channel:
            tap = self._tap(channel)
            while (message := tap.get(no_ack=True)) is not None:
                if not message.headers.get("redelivered"):
                    number, place = message.decode()[0]
                    found.append((number, place, message.headers["id"]))
        return found

    # -- the end -----------------------------------------------------------------------------------------------------

    def _let_arrive(self) -> None:
        """Commit nothing more, be well, and wait until the outbox is empty and the worker has all."""
        self._be_well()
        for place in range(ROLES["web"][0]):
            self._end("web", place, signal.SIGKILL)
        self._proxy.ask(do="cut")
        rest = ("worker", "sender")

        def empty() -> bool:
            self._tend(killing=False, roles=rest)
            return self._waiting() == 0

        eventually(empty, f"the outbox is empty\n{self._log()}", within_s=DRAIN_S)
        expected = {task_id for ids in self._expected().values() for task_id in ids.values()}

        def received() -> bool:
            self._tend(killing=False, roles=rest)
            return expected <= {task_id for _, _, task_id in self._received()}

        with contextlib.suppress(AssertionError):
            eventually(received, "the worker has all", within_s=RECEIVE_S)
        for role in rest:
            for place in range(ROLES[role][0]):
                code = self._end(role, place, signal.SIGTERM)
                self.verdict.ended[role] = self.verdict.ended.get(role, 0) or code

    def _waiting(self) -> int | None:
        """Return how many messages are in the outbox; None: the database is not back yet."""
        try:
            return int(self._database.column("SELECT count(*) FROM celery_alchemy_outbox")[0])
        except DBAPIError:
            return None

    def _expected(self) -> dict[int, dict[int, str]]:
        """Return the messages of the committed transactions: place and id, in their order."""
        found: dict[int, dict[int, str]] = {}
        for note in self._database.rows(self._key):
            number, *given = note.split()
            todo = outbox_plans.plan(self._seed, int(number))
            ids = dict(one.split("=") for one in given)
            found[todo.number] = {
                place: ids[str(place)]
                if todo.parts[place] in {"plain", "savepoint"}
                else outbox_plans.own_id(self._seed, todo.number, place)
                for place in todo.arriving
            }
        return found

    def _received(self) -> list[tuple[int, int, str]]:
        lines = (self._folder / "received").read_text().splitlines()
        return [(int(number), int(place), task_id) for number, place, task_id in map(str.split, lines)]

    def _progress(self) -> dict[str, dict[int, str]]:
        found: dict[str, dict[int, str]] = {"begun": {}, "ended": {}, "failed": {}}
        for line in (self._folder / "progress").read_text().splitlines():
            what, number, *more = line.split()
            found[what][int(number)] = " ".join(more)
        return found

    def _done(self) -> int:
        return (self._folder / "progress").read_bytes().count(b"ended")

    def _judge(self, tapped: list[tuple[int, int, str]]) -> None:
        verdict, expected, progress = self.verdict, self._expected(), self._progress()
        verdict.begun, verdict.committed = len(progress["begun"]), len(expected)
        verdict.undone = len(progress["ended"].keys() - expected.keys())
        verdict.failed, verdict.errors = len(progress["failed"]), Counter(progress["failed"].values())
        verdict.interrupted = len(progress["begun"].keys() - progress["ended"].keys() - progress["failed"].keys())
        verdict.messages = sum(map(len, expected.values()))
        for number, place, task_id in tapped:
            if place not in expected.get(number, {}):
                verdict.ghosts.append(f"{number}.{place}")
            elif expected[number][place] != task_id:
                verdict.wrong_ids.append(f"{number}.{place}")
        arrivals: dict[int, list[int]] = {}
        for number, place, _ in tapped:
            arrivals.setdefault(number, []).append(place)
        for number, places in arrivals.items():
            if [*dict.fromkeys(places)] != sorted(set(places)):
                verdict.order_broken.append(f"{number}: {places} {outbox_plans.plan(self._seed, number)}")
        verdict.repeats = len(tapped) - len(set(tapped))
        received = self._received()
        verdict.run_again = len(received) - len(set(received))
        came, ran = {task_id for *_, task_id in tapped}, {task_id for *_, task_id in received}
        for number, ids in expected.items():
            for place, task_id in ids.items():
                if task_id not in came or (self._pushed is not None and task_id not in self._pushed.ids):
                    verdict.lost.append(f"{number}.{place} {outbox_plans.plan(self._seed, number)}")
                elif task_id not in ran:
                    verdict.lost_in_transport.append(f"{number}.{place}")

    def _log(self) -> str:
        return self._forker.log_tail()
