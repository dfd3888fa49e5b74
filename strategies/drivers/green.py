"""gevent and eventlet: a driver must let the other greenlets run while it waits for the server.

A driver that blocks is not only slow. A greenlet that holds a row lock and has yielded can never go on while another
one waits for that lock inside C: the whole process stands still. So before the first task, each driver is made
cooperative where that can be done, and refused where it cannot.
"""

from __future__ import annotations

import logging
from typing import Any

from sqlalchemy.engine import URL

from ..errors import InvalidSetting
from ..worker_pool import WorkerPool

logger = logging.getLogger(__name__)

#: Drivers that wait inside C, and what to use instead. psycopg2 waits there too, but lets itself be taught.
_BLOCKING = {
    "mysqldb": "mysql+pymysql",
    "mysqlconnector": "mysql+pymysql",
    "mariadbconnector": "mysql+pymysql",
    "pyodbc": "a driver written in Python",
    "pymssql": "a driver written in Python",
    "cx_oracle": "oracle+oracledb",
}
_COOPERATIVE = {"psycopg", "psycopg2", "pymysql", "pg8000", "oracledb"}


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
    driver = url.get_dialect().driver
    if driver in _BLOCKING:
        raise InvalidSetting(
            f"The driver {driver!r} blocks all greenlets of the worker pool {library} while it waits for the server, "
            f"and cannot be made cooperative. Use {_BLOCKING[driver]}, or run the worker with --pool=threads."
        )
    if driver == "psycopg":
        _prepare_psycopg(library)
    elif driver == "psycopg2":
        _prepare_psycopg2(library)
    elif driver == "pysqlite":
        logger.warning(
            "SQLite waits for its lock without letting other greenlets run; under %s it is for trying things out",
            library,
        )
    elif driver not in _COOPERATIVE:
        logger.warning("It is not known whether the driver %r lets other greenlets run under %s", driver, library)


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


def _prepare_psycopg(library: str) -> None:
    # psycopg chooses how to wait when it is imported: in C unless gevent had patched by then, and it does not know
    # eventlet. `wait` is looked up at each call, so a late change reaches every connection.
    import selectors

    from psycopg import waiting

    in_c = getattr(waiting, "wait_c", None)
    unfit = {in_c} if library == "gevent" else {in_c, waiting.wait_poll, getattr(waiting, "wait_epoll", None)}
    if waiting.wait in unfit:
        waiting.wait = waiting.wait_select
        # Connecting waits with a selector bound at import.
        waiting.DefaultSelector = selectors.DefaultSelector  # type: ignore[attr-defined]


def _prepare_psycopg2(library: str) -> None:
    from psycopg2 import extensions

    if extensions.get_wait_callback() is None:
        extensions.set_wait_callback(_gevent_wait if library == "gevent" else _eventlet_wait)


def _gevent_wait(connection: Any, timeout: float | None = None) -> None:
    from gevent.socket import wait_read, wait_write
    from psycopg2 import extensions

    while True:
        state = connection.poll()
        if state == extensions.POLL_OK:
            return
        if state == extensions.POLL_READ:
            wait_read(connection.fileno(), timeout=timeout)
        elif state == extensions.POLL_WRITE:
            wait_write(connection.fileno(), timeout=timeout)
        else:
            raise extensions.psycopg2.OperationalError(f"unexpected answer of poll(): {state}")


def _eventlet_wait(connection: Any, timeout: float = -1) -> None:
    from eventlet.hubs import trampoline
    from psycopg2 import extensions

    while True:
        state = connection.poll()
        if state == extensions.POLL_OK:
            return
        if state == extensions.POLL_READ:
            trampoline(connection.fileno(), read=True)
        elif state == extensions.POLL_WRITE:
            trampoline(connection.fileno(), write=True)
        else:
            raise extensions.psycopg2.OperationalError(f"unexpected answer of poll(): {state}")
