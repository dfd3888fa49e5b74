"""Greenlets that commit on two databases in two phases, each interrupted at a random moment.

Arguments: URL of the default database, URL of the other, key, how many, what interrupts: "timeout" or "kill".
"""

from gevent import monkey

monkey.patch_all()

import logging  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402

import gevent  # noqa: E402
from celery import Celery  # noqa: E402
from support.project.models import Row  # noqa: E402

from celery_alchemy import Alchemy, WorkerPool  # noqa: E402

here, there, key, count, how = sys.argv[1:]
logging.disable(logging.CRITICAL)
app = Celery("storm", broker="memory://", set_as_current=False)
app.conf.update(alchemy_database_url=here, alchemy_databases={"reports": there}, alchemy_two_phase=True)
db = Alchemy(app)
reports = db.databases["reports"]
for one in (db, reports):
    one.start_worker(WorkerPool(name="gevent", concurrency=10))


def write(number: int) -> None:
    with db.unit_of_work() as session:
        for used in [session, reports.session()] if number % 2 else [reports.session(), session]:
            used.add(Row(key=key, note=str(number)))
            used.flush()


def interrupted(number: int) -> None:
    try:
        with gevent.Timeout(random.uniform(0.002, 0.04) if how == "timeout" else None):
            write(number)
    except BaseException:
        return


write(-1)
for start in range(0, int(count), 10):
    greenlets = [gevent.spawn(interrupted, number) for number in range(start, start + 10)]
    if how == "kill":
        for greenlet in greenlets:
            gevent.spawn_later(random.uniform(0.002, 0.04), greenlet.kill, block=False)
    gevent.joinall(greenlets)
write(-2)
out = [one.engine.pool.checkedout() for one in (db, reports)]
assert out == [0, 0], out
print("ended", flush=True)
