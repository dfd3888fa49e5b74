"""Making Engines: the defaults that tasks need, the guards that keep them safe, the user's options on top."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Connection, Engine, ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, QueuePool

from . import connection_pool, forks, sqlite, two_phase
from .abandon import abandon
from .drivers import cancel_statement, server_rolled_back, shown
from .errors import InvalidSetting
from .features.first_statement import begin_with_first_statement
from .interrupts import is_interrupt, is_kill
from .keepalive import keep_alive, libpq_defaults
from .lost_clients import notice_lost_clients
from .read_only import set_read_only_at_connect
from .sizing import PoolSize
from .statement_timeout import limit_statements
from .terms import Terms
from .transient import narrow

logger = logging.getLogger(__name__)

EngineListener = Callable[[Engine], object]
#: Called with a database error, its connection, and whether the server has rolled the transaction back because of it.
ErrorObserver = Callable[[BaseException, Connection | None, bool], None]
CONNECT_TIMEOUT_S = 10
_SERVER_STATUS_IN_TRANS = 1
#: Key in `ConnectionPoolEntry.info`: since the checkout, a transaction was ended by COMMIT or ROLLBACK.
_ENDED = "celery_alchemy.ended"
_POOL_OPTIONS = frozenset({"pool_size", "max_overflow", "pool_timeout", "pool_use_lifo", "poolclass", "pool"})
_listened: weakref.WeakSet[Engine] = weakref.WeakSet()
_imposed: weakref.WeakSet[Engine] = weakref.WeakSet()


class Scope(Protocol):
    """What is known of the thread or greenlet that is running."""

    def labels(self) -> str:
        """Name its open units of work, the innermost first."""

    def runs_task(self) -> bool:
        """Tell whether it runs a task request."""

    def connects(self) -> bool:
        """Tell whether the Session of its innermost unit of work is connecting now."""

    def executing(self, statement: str) -> None:
        """A statement begins."""

    def executed(self) -> None:
        """It is over, however."""

    def returned(self) -> None:
        """A connection has come back to its pool."""


class EngineSource:
    """Where Engines come from: the user's own, or a URL with options.

    Args:
        url: Checked by `drivers.parse_url`; ignored when `engine` is given.
        options: Keyword arguments of `create_engine`; they win over every default here.
        engine: The user's Engine. It is never replaced, resized or closed behind the user's back: only its connection
            pool is made anew, with its own sizes, where a fork or a monkey patch makes that necessary.
        scope: What the connection pool asks about the thread or greenlet that wants a connection.
        observe: Called with every database error, for the message of a broken transaction.
        replica_url: Where units of work read that are read-only; None: at `url`.
        terms: What the app asks of this database beyond that.
    """

    def __init__(
        self,
        url: URL | None,
        options: dict[str, Any],
        engine: Engine | None,
        scope: Scope,
        observe: ErrorObserver,
        replica_url: URL | None = None,
        terms: Terms | None = None,
    ) -> None:
        if engine is None and url is None:
            raise TypeError("an Engine or a URL is needed")
        self.given = engine
        self.url: URL = engine.url if engine is not None else url  # type: ignore[assignment]
        self.options = options
        self.replica_url = replica_url
        self.terms = terms or Terms()
        self.scarce = False
        """Tasks queue for the connections of this database, and use others beside it."""
        self._scope = scope
        self._observe = observe
        self._listeners: list[EngineListener] = []
        self.others: list[Engine] = []
        """Engines that the user's Sessions are bound to beside this one."""
        self._announced: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._guarded_given = False
        self._first: Engine | None = None
        self.lock = threading.Lock()
        self.write_lock_at_begin = False
        """SQLite only: take the write lock when a transaction begins. For workers, whose tasks compete; a script or a
        test that calls tasks eagerly may write in a nested unit of work while the outer one has only read."""

    def after_fork(self) -> None:
        # The thread that held the lock in the parent is not in this process to release it.
        self.lock = threading.Lock()

    def on_engine(self, listener: EngineListener) -> None:
        """Run `listener(engine)` for every Engine made from now on, and for those already made."""
        self._listeners.append(listener)
        for engine in list(self._announced):
            listener(engine)

    def announce(self, engine: Engine) -> Engine:
        """Run the listeners for `engine`, once; for the strategy to call when it has put the Engine in its place."""
        if engine not in self._announced:
            self._announced.add(engine)
            for listener in self._listeners:
                listener(engine)
        return engine

    def given_size(self) -> PoolSize | None:
        """Return the size of the user's own connection pool; None when there is none, or it is no queue."""
        if self.given is None or not isinstance(self.given.pool, QueuePool):
            return None
        return connection_pool.size_of(self.given.pool)

    def shared(self, size: PoolSize) -> Engine:
        """Return the one Engine that lives as long as this process, its connection pool of this `size`.

        An Engine made before the worker pool was known (a listener attached at import) is kept and resized.
        """
        if self.given is not None:
            return self._adopt(self.given)
        with self.lock:
            if self._first is None:
                self._first = self.pooled(size)
            else:
                self._resize(self._first, size)
            return self._first

    def pooled(self, size: PoolSize) -> Engine:
        """Return a new Engine with a connection pool of this `size`; the user's own when there is one.

        Connects to nothing. Raises:
            InvalidSetting: the options are none that `create_engine` takes.
        """
        if self.given is not None:
            return self._adopt(self.given)
        if (
            self.options.get("poolclass", QueuePool) is not QueuePool
            or "pool" in self.options
            or sqlite.in_memory(self.url)
        ):
            return self._make({})  # the user chose, or the database lives in one connection
        sizes = {"pool_size": size.pool_size, "max_overflow": size.max_overflow}
        engine = self._make({"poolclass": connection_pool.ReservedQueuePool, **sizes})
        if isinstance(engine.pool, connection_pool.ReservedQueuePool):
            engine.pool.reserve = size.reserve
            self._introduce(engine.pool)
        return engine

    def unpooled(self) -> Engine:
        """Return a new Engine that closes each connection after use; the user's own when there is one."""
        if self.given is not None:
            return self._adopt(self.given)
        if sqlite.in_memory(self.url):
            return self._make({})
        return self._make({"poolclass": NullPool}, leave_out=_POOL_OPTIONS)

    def reading(self, main: Engine) -> Engine:
        """Return an Engine on which each statement commits itself and none may write, as big as `main`.

        The user's own Engine cannot be copied: its connections are used, switched to AUTOCOMMIT while they read.
        """
        if self.given is not None:
            return main.execution_options(isolation_level="AUTOCOMMIT")
        if sqlite.in_memory(self.url):
            return main  # the database lives in its connection
        decided: dict[str, Any] = {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
        if isinstance(main.pool, connection_pool.ReservedQueuePool):
            size = connection_pool.size_of(main.pool)
            decided |= {"poolclass": connection_pool.ReservedQueuePool, "pool_size": size.pool_size}
            decided |= {"max_overflow": size.max_overflow}
        elif isinstance(main.pool, NullPool):
            return self._make({**decided, "poolclass": NullPool}, leave_out=_POOL_OPTIONS, reads=True)
        engine = self._make(decided, reads=True)
        if isinstance(engine.pool, connection_pool.ReservedQueuePool):
            if isinstance(main.pool, connection_pool.ReservedQueuePool):
                engine.pool.join(main.pool)
            self._introduce(engine.pool)
        return engine

    def adopt_others(self, engines: Iterable[Engine]) -> None:
        """Guard the Engines that the user's Sessions are bound to beside the main one (`binds`)."""
        self.others = list({id(engine): engine for engine in engines if engine is not self.given}.values())
        for engine in self.others:
            _listen(engine, self._observe, self._scope)
            if isinstance(engine.pool, QueuePool):
                self._resize(engine, connection_pool.size_of(engine.pool))

    def _make(self, decided: dict[str, Any], leave_out: Iterable[str] = (), *, reads: bool = False) -> Engine:
        url = (self.replica_url or self.url) if reads else self.url
        options = _driver_defaults(url, self.options, self.terms)
        options |= {name: value for name, value in self.options.items() if name not in leave_out}
        options |= decided
        if "connect_args" in self.options:
            options["connect_args"] = {
                **_driver_defaults(url, {}, self.terms).get("connect_args", {}),
                **self.options["connect_args"],
            }
        try:
            engine = create_engine(url, **options)
        except Exception as error:
            if is_interrupt(error):
                raise
            names = ", ".join(sorted(self.options)) or "none"
            raise InvalidSetting(
                f"{self.terms.options_setting} cannot be used with {shown(self.url)!r}: "
                f"{type(error).__name__}: {error}. Options given: {names} (values not shown)."
            ) from None
        _explain_failing_creator(engine, self.terms.options_setting)
        _listen(engine, self._observe, self._scope, fresh=True)
        if not self.terms.external_pooler:
            notice_lost_clients(engine)
        if engine.dialect.driver == "pymysql":
            keep_alive(engine)
        if self.url.get_backend_name() == "sqlite":
            sqlite.listen(engine, self, reads)
        elif engine.dialect.driver == "pymysql" and "pool_reset_on_return" not in self.options and not reads:
            _spare_second_rollback(engine)
        if reads and not self.terms.external_pooler:
            set_read_only_at_connect(engine)
        if not reads:
            begin_with_first_statement(engine, self.terms.begin_with_first_statement)
        self._impose(engine)
        return engine

    def _impose(self, engine: Engine) -> None:
        """Let `engine` do what the app asks of its database, once."""
        if engine in _imposed:
            return
        _imposed.add(engine)
        if self.terms.statement_timeout_s is not None and not self.terms.external_pooler:
            limit_statements(engine, self.terms.statement_timeout_s)
        if self.terms.two_phase:
            two_phase.name_transactions(engine, self.terms.database)

    def _adopt(self, engine: Engine) -> Engine:
        if not self._guarded_given:
            self._guarded_given = True
            _listen(engine, self._observe, self._scope)
            begin_with_first_statement(engine, self.terms.begin_with_first_statement)
            self._impose(engine)
        self._resize(engine, self.given_size())
        return engine

    def _resize(self, engine: Engine, size: PoolSize | None) -> None:
        """Give `engine` a new connection pool: its locks are of this side of the fork and the monkey patch."""
        old = engine.pool
        if size is None or type(old) not in {QueuePool, connection_pool.ReservedQueuePool}:
            return
        if isinstance(old, connection_pool.ReservedQueuePool) and connection_pool.size_of(old) == size:
            return
        new = connection_pool.like(old, pool_size=size.pool_size, max_overflow=size.max_overflow, reserve=size.reserve)
        self._introduce(new)
        engine.pool = new
        connection_pool.retire(old)

    def _introduce(self, pool: connection_pool.ReservedQueuePool) -> None:
        pool.who, pool.queues, pool.is_own = self._scope.labels, self._scope.runs_task, self._scope.connects
        pool.scarce, pool.database, pool.returned = self.scarce, self.terms.database, self._scope.returned


def _driver_defaults(url: URL, options: dict[str, Any], terms: Terms) -> dict[str, Any]:
    driver = url.get_dialect().driver
    # A statement prepared on one connection of the server is unknown on the next, or has another's name.
    unprepared = {"prepare_threshold": None} if driver == "psycopg" and terms.external_pooler else {}
    if driver in {"psycopg", "psycopg2"}:
        # libpq waits for ever by default, and a soft time limit is deferred during a connect.
        timeout = {} if "connect_timeout" in url.query else {"connect_timeout": CONNECT_TIMEOUT_S}
        return {"connect_args": timeout | libpq_defaults(url) | unprepared}
    if driver == "pymysql" and "pool_reset_on_return" not in options:
        # A Session ends its transaction itself; the connection pool's own ROLLBACK would cost a second round trip.
        return {"pool_reset_on_return": None}
    return {}


def _explain_failing_creator(engine: Engine, setting: str) -> None:
    """Say where to look when connecting fails before the driver has asked the server: no check at start can find it."""
    create = engine.pool._invoke_creator

    def creator(connection_record: ConnectionPoolEntry | None = None) -> Any:
        try:
            return create(connection_record)  # type: ignore[arg-type]
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            logger.error(
                "Making a connection failed with %s before the server was asked. Look at connect_args and creator in "
                "%s, and at what listens to the Engine.", type(error).__name__, setting,
            )  # fmt: skip
            raise

    engine.pool._creator = creator


def _listen(engine: Engine, observe: ErrorObserver, scope: Scope, *, fresh: bool = False) -> None:
    forks.guard(engine, fresh=fresh)
    if engine in _listened:
        return  # the user's Engine, served by another Alchemy before
    _listened.add(engine)

    def on_error(context: ExceptionContext) -> BaseException | None:
        error = context.original_exception
        scope.executed()
        lost = server_rolled_back(engine.dialect, error)
        if not is_interrupt(error):
            narrow(context.sqlalchemy_exception, disconnected=context.is_disconnect)
        observe(context.sqlalchemy_exception or error, context.connection, lost)
        if not is_interrupt(error):
            return None
        # The protocol is in the middle of an answer: SQLAlchemy must not send a ROLLBACK that the driver refuses with
        # an error of its own, which would hide this one and leave the slot checked out.
        connection = context.connection
        if connection is not None and is_kill(error):
            abandon(connection)
        elif connection is not None and not connection.closed and not connection.invalidated:
            cancel_statement(connection.connection.dbapi_connection, engine)
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False
        if context.sqlalchemy_exception is None:
            return None
        # It struck while the statement was put together, and SQLAlchemy would wrap it in a StatementError. A second
        # one, for SQLAlchemy raises what is returned here from the first.
        return type(error)(*error.args)

    def before_execute(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        scope.executing(statement)

    def after_execute(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        scope.executed()

    event.listen(engine, "handle_error", on_error)
    event.listen(engine, "before_cursor_execute", before_execute)
    event.listen(engine, "after_cursor_execute", after_execute)
    if not isinstance(engine.pool, QueuePool):
        event.listen(engine, "checkin", lambda connection, record: scope.returned())


def _spare_second_rollback(engine: Engine) -> None:
    """Let the connection pool send its ROLLBACK only where a transaction may be open: a Session has ended its own.

    The server's last answer says whether one is open, but an error is an answer that does not say so; so COMMIT and
    ROLLBACK are noted too. Whoever takes a raw connection ends nothing, and gets the pool's ROLLBACK.
    """

    def noting(end: Callable[[Any], None]) -> Callable[[Any], None]:
        def ended(connection: Any) -> None:
            end(connection)
            record = getattr(connection, "_connection_record", None)
            if record is not None:
                record.info[_ENDED] = True

        return ended

    def on_checkout(dbapi_connection: object, record: ConnectionPoolEntry, fairy: object) -> None:
        record.info.pop(_ENDED, None)

    def on_reset(dbapi_connection: Any, record: ConnectionPoolEntry | None, state: object) -> None:
        is_open = getattr(dbapi_connection, "server_status", _SERVER_STATUS_IN_TRANS) & _SERVER_STATUS_IN_TRANS
        if is_open or record is None or not record.info.get(_ENDED):
            dbapi_connection.rollback()

    dialect: Any = engine.dialect
    dialect.do_commit, dialect.do_rollback = noting(dialect.do_commit), noting(dialect.do_rollback)
    event.listen(engine, "checkout", on_checkout)
    event.listen(engine, "reset", on_reset)
