"""A process that forks in the middle of a large SQLite transaction. Arguments: path of the database, whether its
Engine is the user's own (`engine`) or not (`url`), what the child does. Prints what the database holds afterwards."""

import gc
import json
import os
import sys

from celery import Celery
from sqlalchemy import create_engine, select, text
from support.project.models import Base, Row

from celery_alchemy import Alchemy

path, whose, action = sys.argv[1:]
app = Celery("forks", set_as_current=False)
if whose == "engine":
    db = Alchemy(app, engine=create_engine(f"sqlite:///{path}"))
else:
    app.conf.alchemy_database_url = f"sqlite:///{path}"
    db = Alchemy(app)


def child() -> None:
    if action == "kill":
        os.kill(os.getpid(), 9)
    elif action == "close":
        session.close()
        gc.collect()
        os._exit(0)
    elif action == "dispose":
        db.engine.dispose()
    elif action == "read":
        with db.unit_of_work() as own:
            assert list(own.scalars(select(Row.note))) == ["before"]
    elif action == "exit":
        os._exit(0)
    sys.exit(0)


Base.metadata.create_all(db.engine)
with db.unit_of_work() as session:
    session.add(Row(key="before", note="before"))
with db.unit_of_work() as session:
    # More than the cache holds: the transaction is partly in the file already.
    session.execute(text("PRAGMA cache_size = 2"))
    session.execute(text("UPDATE rows_ SET note = 'changed'"))
    for number in range(300):
        session.add(Row(key=f"{number:064}", note="x" * 200))
        session.flush()
    pid = os.fork()
    if pid == 0:
        child()
    os.waitpid(pid, 0)
with db.unit_of_work() as session:
    notes = list(session.scalars(select(Row.note).order_by(Row.id)))
    check = session.scalar(text("PRAGMA integrity_check"))
print(json.dumps({"first": notes[0], "rows": len(notes), "check": check}))
