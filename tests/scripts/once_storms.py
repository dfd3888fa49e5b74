"""Storms over many setups, one after the other, on servers of their own; each leaves a line of JSON.

python -m scripts.once_storms --out FILE [--seconds 60] [--kills 400] [--ways ours] [--brokers redis,rabbitmq]
    [--databases postgresql,mariadb] [--pools prefork,...] [--results redis,alchemy] [--rounds 1]
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from support import preloaded
from support.once_storm import POOLS, WAYS, Storm
from support.storm_verdict import Setup, written

from celery_alchemy.loadtests.services.rundir import run_directory
from celery_alchemy.loadtests.services.servers import MariaDBServer, PostgreSQLServer, ValkeyServer

RABBITMQ = os.environ.get("CELERY_ALCHEMY_TEST_RABBITMQ", "amqp://guest:guest@127.0.0.1:5672//")


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for logs")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--prefork-seconds", type=float, default=None, help="where kills are cheap")
    parser.add_argument("--kills", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=20261127)
    several = {"ways": WAYS[3:4], "brokers": ("redis", "rabbitmq"), "databases": ("postgresql", "mariadb")}
    for name, default in {**several, "pools": tuple(POOLS), "results": ("redis",)}.items():
        parser.add_argument(
            f"--{name}", type=lambda value: tuple(value.split(";" if ";" in value else ",")), default=default
        )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the workers are not to outlive this
    total = 0
    with places() as found:
        chosen = list(itertools.product(given.ways, given.brokers, given.databases, given.pools, given.results))
        for number in range(given.rounds):
            random.Random(given.seed + number).shuffle(chosen)
            for setup in itertools.starmap(Setup, chosen):
                folder = given.folder / str(setup).replace(", ", "-").replace(" ", "_") / str(given.seed + number)
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    storm = Storm(setup, found, folder, given.seed + number, given.workers)
                    verdict = storm.run(
                        given.kills,
                        given.prefork_seconds or given.seconds if setup.pool == "prefork" else given.seconds,
                    )
                except Exception:
                    print(setup, traceback.format_exc(), flush=True)
                    continue
                total += verdict.kills.total()
                with given.out.open("a") as out:
                    out.write(json.dumps(written(verdict)) + "\n")
                print(
                    f"{setup}: {verdict.kills.total()} kills in {verdict.seconds} s ({total} in all), "
                    f"{verdict.flows} flows, {verdict.due} due, {verdict.twice} twice, {verdict.lost} lost, "
                    f"{verdict.lost_by_kombu} by kombu, {verdict.wrong_results} wrong, {verdict.failures} failures; "
                    f"after: {verdict.twice_after} twice, {verdict.lost_after} lost", flush=True,
                )  # fmt: skip
    preloaded.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
