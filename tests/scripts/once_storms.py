"""Storms over many setups, several at a time, on servers of their own; each leaves a line of JSON.

make storms                     the whole plan: every worker pool on every broker and database, `def` and `async def`
make storms STORMS_ARGS="..."   what follows; without a list of setups there, it is the plan
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from support import once_storm, storm_flows, storm_verdict, storm_workers
from support.once_storm import Storm
from support.storm_verdict import Setup, written

from celery_alchemy.loadtests.services.rundir import run_directory
from celery_alchemy.loadtests.services.servers import MariaDBServer, PostgreSQLServer, ValkeyServer

RABBITMQ = os.environ.get("CELERY_ALCHEMY_TEST_RABBITMQ", "amqp://guest:guest@127.0.0.1:5672//")
POOLS = tuple(storm_workers.POOLS)
AWAITING = ("prefork", "threads", "solo", "asyncio")
BROKERS = ("redis", "rabbitmq")
PLACES = list(itertools.product(BROKERS, ("postgresql", "mariadb"), POOLS))
HARNESS = [once_storm, storm_flows, storm_verdict, storm_workers]
NEVER = ("twice", "lost", "bodies_twice", "wrong_results", "failures", "set_aside", "twice_after", "lost_after")
"""What must not happen to tasks with `exactly_once`."""
Row = dict[str, Any]


def plan() -> list[Setup]:
    """Return the setups of ours: each place twice, and what it is the one time it is not the other time."""
    found = []
    for half, (number, (broker, database, pool)) in itertools.product((0, 1), enumerate(PLACES)):
        for asynchronous in range(1 + (pool in AWAITING)):
            turn = number + asynchronous
            way, results = ("ours", "ours, last")[(half + turn // 2) % 2], ("redis", "alchemy")[(half + turn) % 2]
            begins = "along" if database == "postgresql" and (half + turn // 3) % 2 else "first"
            found.append(Setup(way, broker, database, pool, results, ("def", "async def")[asynchronous], begins))
    return found


def beside() -> list[Setup]:
    """Return the setups of what others do."""
    places = itertools.product(once_storm.WAYS[:3], BROKERS, ("postgresql",), ("prefork", "threads"))
    return list(itertools.starmap(Setup, places))


def version() -> Row:
    """Return what says that two rows were made by the same harness, and of which work."""
    files = sorted([Path(str(module.__file__)) for module in HARNESS] + [Path(__file__).with_name("storm_app.py")])
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"harness": digest, "commit": commit.stdout.strip()}


@contextlib.contextmanager
def places() -> Iterator[dict[str, str]]:
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(run_directory())
        postgresql = stack.enter_context(PostgreSQLServer(run))
        mariadb = stack.enter_context(MariaDBServer(run, "--innodb-flush-log-at-trx-commit=2"))
        valkey = stack.enter_context(ValkeyServer(run))
        yield {
            "postgresql": postgresql.url.render_as_string(hide_password=False),
            "mariadb": mariadb.url.render_as_string(hide_password=False),
            "redis": f"unix://{valkey.socket}?db=0",
            "rabbitmq": RABBITMQ,
        }


def run_one(setup: Setup, found: dict[str, str], folder: Path, given: argparse.Namespace, seed: int) -> None:
    """Run one storm, in a process of its own; leave its row in the folder."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the workers are not to outlive this
    try:
        verdict = Storm(setup, found, folder, seed, given.workers).run(given.kills, given.seconds)
    except Exception:
        (folder / "error").write_text(traceback.format_exc())
        raise
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    more = {"cpu_s": round(sum(one.ru_utime + one.ru_stime for one in used), 1), "load": round(os.getloadavg()[0], 1)}
    (folder / "row").write_text(json.dumps({**written(verdict), **version(), **more}))


class Storms:
    """Runs storms, so many at a time."""

    def __init__(self, given: argparse.Namespace, found: dict[str, str]) -> None:
        self._given, self._places = given, found
        self._running: dict[Path, tuple[Setup, BaseProcess]] = {}
        self.rows: list[Row] = []
        self.broken: list[Setup] = []
        self._started = time.monotonic()

    def run(self, setups: Sequence[Setup]) -> None:
        waiting = list(enumerate(setups))
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self._given.at_once:
                    self._start(*waiting.pop(0))
                time.sleep(0.2)
                for folder in [folder for folder, (_, process) in self._running.items() if not process.is_alive()]:
                    self._end(folder)
        finally:
            for _, process in self._running.values():
                process.terminate()
            for _, process in self._running.values():
                process.join(20)

    def _start(self, number: int, setup: Setup) -> None:
        folder = self._given.folder.absolute() / f"{number:03}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        arguments = (setup, self._places, folder, self._given, self._given.seed + number)
        process = multiprocessing.get_context("fork").Process(target=run_one, args=arguments)
        process.start()
        self._running[folder] = setup, process

    def _end(self, folder: Path) -> None:
        setup, process = self._running.pop(folder)
        process.join()
        if not (folder / "row").exists():
            self.broken.append(setup)
            error = folder / "error"
            print(setup, "BROKEN", error.read_text() if error.exists() else process.exitcode, flush=True)
            return
        row = json.loads((folder / "row").read_text())
        self.rows.append(row)
        with self._given.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        odd = {name: row[name] for name in NEVER if row[name]}
        if not row["odd"] and not odd and not self._given.keep:
            shutil.rmtree(folder)
        passed_s, total = time.monotonic() - self._started, sum(map(kills_of, self.rows))
        print(
            f"{setup}: {kills_of(row)} kills in {row['seconds']:.0f} s, {row['cpu_s']:.0f} s of CPU; {row['due']} due, "
            f"{row['lost_by_kombu']} by kombu; {odd or 'nothing wrong'}{'' if row['settled'] else ', NOT SETTLED'}. "
            f"In all {total} kills in {passed_s:.0f} s", flush=True,
        )  # fmt: skip


def kills_of(row: Row) -> int:
    return sum(row["kills"].values())


def missing(rows: Sequence[Row], setups: Sequence[Setup]) -> list[str]:
    """Return the places that were to have kills, and have none."""

    def place(setup: Row) -> tuple[str, ...]:
        return tuple(str(setup[name]) for name in ("broker", "database", "pool", "tasks"))

    due = {place(dataclasses.asdict(setup)): setup for setup in setups if setup.way.startswith("ours")}
    kills: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        kills[place(row["setup"])] += kills_of(row) * row["setup"]["way"].startswith("ours")
    return [", ".join(name) for name in due if not kills[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for logs; those of a storm that is odd stay")
    parser.add_argument("--keep", action="store_true", help="all of them")
    parser.add_argument("--seconds", type=float, default=240, help="so long at most")
    parser.add_argument("--kills", type=int, default=130, help="for each storm")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=3, help="storms")
    parser.add_argument("--workers", type=int, default=3, help="for each storm")
    parser.add_argument("--seed", type=int, default=20261127)
    parser.add_argument("--plan", choices=["all", "ours", "beside"], default="all")
    parser.add_argument("--only", default="", help="setups whose description has all of these, separated by ;")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chance = random.Random(given.seed)
    first, second = plan()[: len(plan()) // 2], plan()[len(plan()) // 2 :]
    chosen = []
    for part in (first, beside(), second):  # an early end leaves no place out
        chance.shuffle(part)
        chosen += part
    chosen = [one for one in chosen if given.plan == "all" or (given.plan == "ours") == one.way.startswith("ours")]
    chosen = [one for one in chosen if all(word in str(one) for word in given.only.split(";"))] * given.rounds
    with places() as found:
        storms = Storms(given, found)
        storms.run(chosen)
    wrong = [
        row for row in storms.rows
        if row["setup"]["way"].startswith("ours") and (not row["settled"] or any(row[name] for name in NEVER))
    ]  # fmt: skip
    none = missing(storms.rows, chosen)
    harnesses = {row["harness"] for row in storms.rows}
    print(f"{len(storms.broken)} broken, {len(wrong)} with something wrong; {harnesses=}; without a kill: {none}")
    return bool(storms.broken or wrong or none)


if __name__ == "__main__":
    sys.exit(main())
