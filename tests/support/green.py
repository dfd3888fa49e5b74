"""What the tests of gevent and eventlet share."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from support import databases, forking

LIBRARIES = ("gevent", "eventlet")
DRIVERS = ("psycopg", "psycopg2", "pymysql")
ACTIVE = ("active", "Query")  # PostgreSQL's word and MariaDB's
ROUNDS = 5


def url_with(database: databases.Database, driver: str, application_name: str) -> str:
    url = make_url(database.url(application_name))
    return url.set(drivername=f"{url.get_backend_name()}+{driver}").render_as_string(hide_password=False)


def all_seen_asleep(database: databases.Database, name: str, count: int, action: Callable[[], Any]) -> Any:
    """Repeat `action` until `count` statements were seen asleep on the server at once; return its last result.

    A round may be missed by a test process that gets no processor for half a second.
    """
    most = 0
    for _ in range(ROUNDS):
        seen, result = _most_asleep(database, name, action)
        most = max(most, seen)
        if most >= count:
            return result
    raise AssertionError(f"only {most} of {count} statements were active at the same time")


def _most_asleep(database: databases.Database, name: str, action: Callable[[], Any]) -> tuple[int, Any]:
    """Run `action` in a thread; return how many statements were seen asleep on the server at once, and its result."""
    most = 0
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(action)
        while not running.done():
            most = max(most, sum("sleep(" in c.query.lower() for c in database.busy(name) if c.state in ACTIVE))
        return most, running.result()


def host(library: str, log: Path, url: str, **settings: Any) -> AbstractContextManager[forking.Script]:
    """Run `scripts.green_host` for the time of a block."""
    return forking.script("green_host", log, own=True, library=library, url=url, **settings)
