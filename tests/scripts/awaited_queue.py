"""500 `async def` tasks that wait in the database for 50 ms, on 20 connections: how long, against the floor of 1.25 s.

cd tests && ../.venv/bin/python -m scripts.awaited_queue --runs 10 --broker redis --driver psycopg

Each run is a row of JSON, all on one worker: the time from the first message that is sent to the last task that has
ended, and that from the first task that begins; both as ratios to the floor. It needs a Redis server for what it says.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import redis
from celery import Celery
from celery.signals import task_postrun, task_prerun, worker_ready
from sqlalchemy import text

from celery_alchemy import Alchemy, AsyncDatabaseTask

config: dict[str, Any] = json.loads(os.environ.get("AWAITED_QUEUE", "{}"))
TASKS, CONNECTIONS, WAITS_S, WITHIN_S = 500, 20, 0.05, 60
FLOOR_S = TASKS / CONNECTIONS * WAITS_S
QUEUE = f"awaited-queue-{os.environ.get('AWAITED_QUEUE_PID', os.getpid())}"

app = Celery("awaited_queue", broker=config.get("broker"))
app.conf.update(
    alchemy_database_url=config.get("url"), alchemy_engine_options={"pool_size": CONNECTIONS, "max_overflow": 0}
)
app.conf.update(task_default_queue=QUEUE, task_ignore_result=True, worker_hijack_root_logger=False)
db = Alchemy(app)
client = redis.Redis.from_url(config.get("redis", "redis://127.0.0.1:6379"))
begun: list[float] = []
ended: list[float] = []


@app.task(base=AsyncDatabaseTask, bind=True, name="waits")
async def waits(self: Any) -> None:
    await self.db.execute(text(config["statement"]))


@task_prerun.connect(weak=False)
def begins(**_: Any) -> None:
    begun.append(time.time())


@task_postrun.connect(weak=False)
def ends(**_: Any) -> None:
    ended.append(time.time())
    if len(ended) == TASKS:
        client.rpush(QUEUE + "-told", json.dumps([begun[0], ended[-1], time.process_time()]))
        begun.clear()
        ended.clear()


@worker_ready.connect(weak=False)
def is_ready(**_: Any) -> None:
    client.rpush(QUEUE + "-told", json.dumps([0, 0, time.process_time()]))


def told() -> list[float]:
    found: Any = client.blpop([QUEUE + "-told"], timeout=WITHIN_S)
    assert found is not None, "the worker does not answer"
    return json.loads(found[1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--broker", default="redis://127.0.0.1:6379")
    parser.add_argument("--url", default="postgresql+psycopg://127.0.0.1:5432/postgres")
    parser.add_argument("--statement", default=f"SELECT pg_sleep({WAITS_S})", help=f"waits for {WAITS_S} s")
    chosen = parser.parse_args()
    config.update(broker=chosen.broker, url=chosen.url, statement=chosen.statement)
    app.conf.broker_url = chosen.broker
    environment = {**os.environ, "AWAITED_QUEUE": json.dumps(config), "AWAITED_QUEUE_PID": str(os.getpid())}
    command = [sys.executable, "-m", "celery", "-A", "scripts.awaited_queue", "worker", "-P", "asyncio"]
    with subprocess.Popen([*command, "-c", str(TASKS), "-l", "WARNING"], env=environment) as worker:
        try:
            cpu_s = told()[2]
            ratios = []
            for number in range(chosen.runs + 1):
                with app.connection_for_write() as connection:
                    producer = app.amqp.Producer(connection)
                    sent = time.time()
                    for _ in range(TASKS):
                        waits.apply_async(producer=producer)
                first, last, cpu_then_s = told()
                row = {"run": number, "warm_up": number == 0, "ms_cpu_per_task": 1000 * (cpu_then_s - cpu_s) / TASKS}
                row |= {"from_sent": (last - sent) / FLOOR_S, "from_begun": (last - first) / FLOOR_S}
                print(json.dumps({name: round(value, 3) for name, value in row.items()}), flush=True)
                cpu_s = cpu_then_s
                ratios.append(row["from_sent"])
            low, middle, high = statistics.quantiles(ratios[1:], n=4)
            print(f"of the floor of {FLOOR_S:.2f} s: {middle:.2f} [{low:.2f}, {high:.2f}], n = {chosen.runs}")
        finally:
            worker.terminate()
            client.delete(QUEUE, QUEUE + "-told")


if __name__ == "__main__":
    main()
