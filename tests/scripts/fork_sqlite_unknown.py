"""A process that forks with SQLite Engines that celery-alchemy was never told of. Arguments: a path, and a kind: a
database in `memory`, in the memory of a `static` connection, a `file` or a file whose connection is `detached`. Prints
how many rows a child found, and how many there are afterwards."""

import gc
import json
import sys

from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

from celery_alchemy import Alchemy
from scripts.children import forked

path, kind = sys.argv[1:]
in_memory = kind in {"memory", "static"}
engine = create_engine(
    "sqlite://" if in_memory else f"sqlite:///{path}", **({"poolclass": StaticPool} if kind == "static" else {})
)
db = Alchemy(Celery("forks", set_as_current=False))

held = engine.raw_connection()
cursor = held.cursor()
cursor.execute("CREATE TABLE numbers (number)")
cursor.execute("INSERT INTO numbers VALUES (0)")
held.commit()
if kind == "detached":
    held.detach()
if not in_memory:
    # More than the cache holds: the transaction is partly in the file already.
    cursor.execute("PRAGMA cache_size = 2")
    cursor.executemany("INSERT INTO numbers VALUES (?)", [(f"{number:0200}",) for number in range(300)])


def count() -> int:
    with engine.connect() as connection:
        return connection.exec_driver_sql("SELECT count(*) FROM numbers").scalar_one()


def child() -> int:
    if in_memory:
        cursor.execute("INSERT INTO numbers VALUES (1)")
        held.commit()
        return count()
    globals().update(cursor=None)
    for name in ("rollback", "close"):
        try:
            getattr(held, name)()
        except Exception as error:
            print(error, file=sys.stderr)
    globals().update(held=None)
    gc.collect()
    return 0


answer = forked(child)
held.commit()
held.close()
print(json.dumps({"child": answer.get("answer", answer), "rows": count()}))
