"""One round trip less for each transaction on PostgreSQL: BEGIN goes with the first statement.

By hand a task with one statement waits for the server three times: BEGIN, the statement, COMMIT. The answer to BEGIN
says nothing, so it can travel together with the statement. How, the driver's module knows; this one decides where.

It costs the client some CPU per transaction, so that it pays only where a round trip takes longer than that: "auto"
measures it on the first connection that an Engine makes, and leaves local sockets alone.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from time import perf_counter
from types import ModuleType
from typing import Any, Literal

from sqlalchemy.engine import URL, Dialect, Engine
from sqlalchemy.util import await_only

from ..drivers.url import shown
from ..engines.forks import on_fork
from ..options import DatabaseOptions

logger: logging.Logger = logging.getLogger(__name__)

Mode = bool | Literal["auto"]
AUTO: Literal["auto"] = "auto"
WORTH_WHILE_S = 250e-6
"""A round trip that takes longer is worth to be saved. Measured: docs/round-trips.md."""
_MEASUREMENTS = 20
#: Options of create_engine that leave nothing to us.
_OWN_CONNECTIONS = ("creator", "async_creator", "pool", "module")
#: What is of the user's own where it is given to the driver, by whether its connections are awaited.
_OWN_CLASS = {("psycopg2", False): "connection_factory", ("psycopg", True): "async_creator_fn"}


def begin_with_first_statement(engine: Engine, options: DatabaseOptions) -> None:
    """EngineHook: let the connections that `engine` makes from now on send BEGIN along with the first statement.

    With "auto", where a round trip is worth it. Does nothing where it cannot be right: `why_not` says why.
    """
    mode = options.begin_with_first_statement
    if options.reads or not mode or why_not(engine.url, engine.dialect, mode) is not None:
        return
    kind = _AwaitedConnect if engine.dialect.is_async else _Connect
    # Not a `do_connect` listener: the first one that returns a connection is the last one asked, and users have theirs.
    engine.dialect.connect = kind(engine.dialect, mode, shown(engine.url))  # type: ignore[method-assign]


class _Connect:
    """What connects, in place of `Dialect.connect`."""

    def __init__(self, dialect: Dialect, mode: Mode, place: str) -> None:
        self._dialect = dialect
        self._place = place
        self._stock: Any = dialect.connect
        self._driver = _module_of(dialect)
        self._worth_while = None if mode == AUTO else True
        on_fork(self._renew_lock)
        self._renew_lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._worth_while is False or _own_class(self._dialect, kwargs) is not None:
            return self._stock(*args, **kwargs)
        if self._worth_while is None:
            first = self._stock(*args, **kwargs)
            if not self._measure(first):
                return first  # as it is: a connection of another class would cost every statement, used or not
            first.close()
        return self._driver.connect(self._stock, *args, **kwargs)

    def _measure(self, connection: Any) -> bool:
        """Return whether a round trip is worth saving; measured on `connection` where no other has told it before.

        Threads and greenlets that connect at the same time wait for one measurement. If each measured, noise would give
        one Engine two kinds of connections. They have connected before: a server that does not answer delays each once.
        """
        try:
            self._acquire()
            try:
                if self._worth_while is None:
                    self._worth_while = _is_worth_while(connection, self._place)
            finally:
                self._measuring.release()
        except BaseException:
            connection.close()  # SQLAlchemy does not know of it yet
            raise
        return self._worth_while

    def _renew_lock(self) -> None:
        # Another thread of the parent may have held it at the fork.
        self._measuring: threading.Lock | asyncio.Lock = threading.Lock()

    def _acquire(self) -> None:
        self._measuring.acquire()


class _AwaitedConnect(_Connect):
    """The same on an event loop, whose other coroutines go on while one measures."""

    def _renew_lock(self) -> None:
        self._measuring = asyncio.Lock()

    def _acquire(self) -> None:
        await_only(self._measuring.acquire())  # type: ignore[arg-type]


def describe(mode: Mode, url: URL, dialect: type[Dialect], options: dict[str, Any]) -> str:
    """Return what the log line of the worker's start says of it; nothing where that would be no news."""
    reason = why_not(url, dialect, mode, options)
    if not mode or (mode == AUTO and url.get_backend_name() != "postgresql"):
        return ""
    if reason is not None:
        return f"BEGIN has a round trip of its own ({reason})"
    if mode == AUTO:
        return f"BEGIN goes with the first statement where a round trip takes over {WORTH_WHILE_S * 1000:g} ms"
    return "BEGIN goes with the first statement"


def why_not(
    url: URL, dialect: Dialect | type[Dialect], mode: Mode, options: dict[str, Any] | None = None
) -> str | None:
    """Return why BEGIN has a round trip of its own; None where it goes with the first statement.

    Args:
        options: Of create_engine; what cannot be told from them is told from the connection when it is made.
    """
    options = options or {}
    if not mode:
        return "alchemy_begin_with_first_statement = False"
    if dialect.name != "postgresql" or dialect.driver not in {"psycopg", "psycopg2"}:
        return f"not known how for {dialect.name} with {dialect.driver}"
    for name in _OWN_CONNECTIONS:
        if name in options:
            return f"the engine option {name!r} makes the connections"
    if options.get("isolation_level") == "AUTOCOMMIT":
        return "the Engine is in AUTOCOMMIT"
    own = _own_class(dialect, options.get("connect_args", {}))
    if own is not None:
        return f"connect_args has {own}"
    if dialect.driver == "psycopg" and not _has_pipelines():
        return "this libpq has no pipelines"
    if mode == AUTO and is_local(url):
        return "the server is on a local socket"
    return None


def _own_class(dialect: Dialect | type[Dialect], connect_args: dict[str, Any]) -> str | None:
    """Return which of these arguments makes connections of a class of the user's own; None: they can be of ours."""
    name = _OWN_CLASS.get((dialect.driver, dialect.is_async), "")
    given = connect_args.get(name)
    return None if given is None or given.__module__.startswith(__package__.rpartition(".")[0]) else name


def is_local(url: URL) -> bool:
    """Tell whether `url` names a Unix socket. Where it names no host, the environment may: the connection tells."""
    host = url.query.get("host") or url.host
    return isinstance(host, str) and host.startswith(("/", "@"))


def _has_pipelines() -> bool:
    import psycopg

    return psycopg.Pipeline.is_supported()


def _module_of(dialect: Dialect) -> ModuleType:
    if dialect.is_async:
        from ..drivers import begin_awaited_psycopg

        return begin_awaited_psycopg
    if dialect.driver == "psycopg":
        from ..drivers import begin_psycopg

        return begin_psycopg
    from ..drivers import begin_psycopg2

    return begin_psycopg2


def _is_worth_while(connection: Any, place: str) -> bool:
    took_s = round_trip_s(connection)
    worth_while = took_s > WORTH_WHILE_S
    how = "goes with the first statement" if worth_while else "has a round trip of its own"
    logger.info("A round trip to %s takes %.3f ms: BEGIN %s", place, took_s * 1000, how)
    return worth_while


def round_trip_s(connection: Any) -> float:
    """Return how long a new connection waits for an answer of the server, in seconds: the shortest of up to 20.

    The shortest, for what disturbs a measurement makes it longer; on a busy machine most are disturbed.
    """
    before, connection.autocommit = connection.autocommit, True
    took_s: list[float] = []
    cursor = connection.cursor()
    while not took_s or (len(took_s) < _MEASUREMENTS and min(took_s) > WORTH_WHILE_S):
        began = perf_counter()
        cursor.execute("SELECT 1")
        took_s.append(perf_counter() - began)
    cursor.close()
    connection.autocommit = before
    return min(took_s)
