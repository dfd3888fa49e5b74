"""gevent and eventlet: a driver must let the other greenlets run while it waits for the server.

A driver that blocks is not only slow. A greenlet that holds a row lock and has yielded can never go on while another
one waits for that lock inside C: the whole process stands still. So before the first task, each driver is made
cooperative where that can be done, and refused where it cannot.
"""

from __future__ import annotations

import logging

from sqlalchemy.engine import URL

from ..errors import InvalidSetting
from ..worker_pool import WorkerPool
from .base import driver_of

logger: logging.Logger = logging.getLogger(__name__)

#: Drivers that wait inside C and have no module here, and what to use instead.
_BLOCKING = {
    "mysqlconnector": "mysql+pymysql",
    "mariadbconnector": "mysql+pymysql",
    "pyodbc": "a driver written in Python",
    "pymssql": "a driver written in Python",
    "cx_oracle": "oracle+oracledb",
}
_COOPERATIVE = {"oracledb"}


def prepare(worker_pool: WorkerPool, url: URL) -> None:
    """Make the driver of `url` cooperative under a green worker pool; nothing to do under another.

    Raises:
        InvalidSetting: the process is not monkey patched, or the driver cannot be made cooperative.
    """
    if not worker_pool.is_green:
        return
    library = worker_pool.name
    if not is_patched(library):
        raise InvalidSetting(
            f"The worker pool is {library}, but this process is not monkey patched: every wait for the "
            f"database would stop all greenlets. Celery patches only for `celery worker --pool={library}` "
            f"or `-P {library}` (not for `-P{library}` without a blank, the setting worker_pool, "
            f"CELERY_WORKER_POOL, app.Worker() or worker_main()). Start it that way, or patch first thing in the "
            f"program: {_recipe(library)}."
        )
    dialect = url.get_dialect()
    name, driver = dialect.driver, driver_of(dialect)
    if name == "pysqlite":
        logger.warning(
            "SQLite waits for its lock without letting other greenlets run; under %s it is for trying things out",
            library,
        )
        return
    if driver.cooperative is False or name in _BLOCKING:
        raise InvalidSetting(
            f"The driver {name!r} blocks all greenlets of the worker pool {library} while it waits for the server, "
            f"and cannot be made cooperative. Use {_BLOCKING.get(name, driver.instead)}, or run the worker with "
            f"--pool=threads."
        )
    if driver.cooperative is None and name not in _COOPERATIVE:
        logger.warning("It is not known whether the driver %r lets other greenlets run under %s", name, library)
    driver.make_cooperative(library)


def is_patched(library: str) -> bool:
    """Tell whether `library` (gevent or eventlet) has monkey patched the sockets of this process."""
    if library == "gevent":
        from gevent import monkey

        return bool(monkey.is_module_patched("socket"))
    from eventlet import patcher

    return bool(patcher.is_monkey_patched("socket"))


def _recipe(library: str) -> str:
    if library == "gevent":
        return "from gevent import monkey; monkey.patch_all()"
    return "import eventlet; eventlet.monkey_patch()"
