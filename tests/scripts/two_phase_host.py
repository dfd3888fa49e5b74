"""A process that commits on two databases in two phases, and dies or stops at the step it is told to.

Arguments: URL of the default database, URL of the other, key, which of both is used first ("default reads": and only
read from), the step, and what comes there: KILL or STOP. Says at last whether the unit of work has succeeded.
"""

import os
import signal
import sys

from celery import Celery
from sqlalchemy import Engine, event, select
from support.project.models import Row

from celery_alchemy import Alchemy

here, there, key, first, step, comes = sys.argv[1:]
app = Celery("host", broker="memory://", set_as_current=False)
app.conf.update(alchemy_database_url=here, alchemy_databases={"reports": there}, alchemy_two_phase=True)
db = Alchemy(app)
reports = db.databases["reports"]
steps: list[str] = []


def die_at(name: str) -> None:
    steps.append(name)
    if len(steps) == int(step):
        print(name, flush=True)
        os.kill(os.getpid(), signal.Signals[f"SIG{comes}"])


def watch(one: Alchemy) -> None:
    """The steps between which a crash may come: each is just before what it is called after."""

    @one.on_engine
    def listen(engine: Engine) -> None:
        event.listen(engine, "prepare_twophase", lambda connection, xid: die_at(f"prepare {one.database}"))
        event.listen(engine, "commit_twophase", lambda connection, xid, ready: die_at(f"commit {one.database}"))


for one in (db, reports):
    watch(one)


def work() -> None:
    with db.unit_of_work() as session:
        both = [session, reports.session()]
        if first.endswith(" reads"):
            both[first.startswith("reports")].scalars(select(Row).limit(1)).all()
        for used in both if first.startswith("default") else reversed(both):
            if not (first.endswith(" reads") and used is both[first.startswith("reports")]):
                used.add(Row(key=key, note="written"))
                used.flush()


try:
    work()
except Exception as error:
    print("failed:", type(error).__name__, flush=True)
else:
    print("ended", flush=True)
