"""PostgreSQL: psycopg and pg8000, and what all drivers of it have in common."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import closing
from typing import Any, NoReturn

from sqlalchemy.engine import URL, Connection, Dialect, Engine
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.pool import PoolProxiedConnection

from ..options import DatabaseOptions
from ..scope import SCOPE, current_scope, here
from .along import Along
from .base import CANCEL_TIMEOUT_S, FAILED, Connect, Driver, Ended
from .keepalive import libpq_defaults
from .lost_clients import notice_lost_clients
from .reset_postgresql import PsycopgReset
from .session_reset import SessionReset
from .stale import is_stale
from .texts import follow_texts, what_ends

CONNECT_TIMEOUT_S = 10
IDLE = 0  # libpq's PQTRANS_IDLE
_UNKNOWN = 4  # libpq's PQTRANS_UNKNOWN: the connection is lost
_ACTIVE = 1  # libpq's PQTRANS_ACTIVE
IN_TRANSACTION = 2  # libpq's PQTRANS_INTRANS
_LEVELS = {1: "READ_COMMITTED", 2: "REPEATABLE_READ", 3: "SERIALIZABLE", 4: "READ_UNCOMMITTED"}  # psycopg2's
REFUSES = 3  # libpq's PQTRANS_INERROR
_UNCOUNTED = -1_000_000
BY_STATEMENT = Ended("COMMIT or ROLLBACK was executed")
#: A lock on rows, or a value of a sequence, changes nothing that a COMMIT would keep.
HAS_WRITTEN = (
    "SELECT txid_current_if_assigned() IS NOT NULL AND EXISTS (SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND "
    "locktype = 'relation' AND mode NOT IN ('AccessShareLock', 'RowShareLock'))"
)
_READ_ONLY_SQL_TRANSACTION = "25006"
_FEATURE_NOT_SUPPORTED = "0A000"
DEFAULT_READ_ONLY = "default_transaction_read_only"
_DEFAULT_NAME = DEFAULT_READ_ONLY.encode()
#: The server reports each change of these, from PostgreSQL 14 on.
_STANDBY = "in_hot_standby"


class PostgreSQLDriver(Driver):
    """What all drivers of PostgreSQL have in common."""

    def became_read_only(self, error: BaseException, dbapi_connection: Any, *, behind_pooler: bool) -> bool:
        code = self.code_of(error)
        if code == _FEATURE_NOT_SUPPORTED:
            # BEGIN READ WRITE, which SQLAlchemy lets a connection say that has said BEGIN READ ONLY before.
            return self.parameter(dbapi_connection, _STANDBY) == "on"
        if code != _READ_ONLY_SQL_TRANSACTION or DEFAULT_READ_ONLY in self.startup_options(dbapi_connection):
            return False
        known = {self.parameter(dbapi_connection, name) for name in (_STANDBY, DEFAULT_READ_ONLY)}
        # Both off: it is this transaction that was begun read-only, by whatever statement.
        return behind_pooler or known == {None} or "on" in known

    def parameter(self, dbapi_connection: Any, name: str) -> str | None:
        """Return a parameter of the server as it was reported last; None where it is not."""
        found: str | None = dbapi_connection.info.parameter_status(name)
        return found

    def startup_options(self, dbapi_connection: Any) -> str:
        """Return the command-line options that the connection was made with."""
        return dbapi_connection.info.options or ""


class Libpq(PostgreSQLDriver):
    """What psycopg and psycopg2 have in common."""

    cooperative: bool = True
    failed_status: int = REFUSES

    def connect_args(self, url: URL, options: DatabaseOptions) -> dict[str, Any]:
        # libpq waits for ever by default, and a soft time limit is deferred during a connect.
        timeout = {} if "connect_timeout" in url.query else {"connect_timeout": CONNECT_TIMEOUT_S}
        return timeout | libpq_defaults(url)

    def listen(self, engine: Engine, options: DatabaseOptions) -> None:
        if not options.external_pooler:
            notice_lost_clients(engine)

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        return dbapi_connection is not None and self.status_of(dbapi_connection) not in {IDLE, _UNKNOWN}

    def left_on_reading(self, dbapi_connection: Any) -> str | None:
        if self.status_of(dbapi_connection) != IDLE:  # psycopg2 does not know it as one of its own, in autocommit
            return "a transaction is open"
        return f"{DEFAULT_READ_ONLY} is off" if self.parameter(dbapi_connection, DEFAULT_READ_ONLY) == "off" else None

    def is_executing(self, dbapi_connection: Any) -> bool:
        return dbapi_connection is not None and self.status_of(dbapi_connection) == _ACTIVE

    def has_written(self, connection: Connection) -> bool | None:
        return bool(connection.exec_driver_sql(HAS_WRITTEN).scalar())

    def same_state(self, dialect: Dialect, before: Any, after: Any) -> bool:
        # SQLAlchemy sets back what it has set, None to the server's default by name, False where nothing was.
        default = (getattr(dialect, "default_isolation_level", None) or "").replace(" ", "_")
        levels = {level if isinstance(level, str | None) else _level_name(level) for level in (before[1], after[1])}
        return (
            before[0] == after[0]
            and levels <= {None, default, _level_name(before[1])}
            and bool(before[2]) == bool(after[2])
            and bool(before[3]) == bool(after[3])
            and before[4] == after[4]
            # That of a new connection notes what listeners execute, where `alchemy_reset_on_return` is on.
            and after[5] in {before[5], getattr(before[5], "celery_alchemy_instead_of", before[5])}
            and before[6:] == after[6:]
        )


class Psycopg(Libpq):
    """psycopg 3."""

    # Written in C, like the others: each task asks.
    status_of: Callable[[Any], Any] = operator.attrgetter("pgconn.transaction_status")
    # What the properties of these names return: each task looks, and would pay 2,000 instructions for them.
    state_names: tuple[str, ...] = (
        *("_autocommit", "_isolation_level", "_read_only", "_deferrable", "row_factory", "cursor_factory"),
        *("celery_alchemy_begins", "pgconn.transaction_status", "_adapters.celery_alchemy_registered"),
    )
    state_of: Callable[[Any], Any] = operator.attrgetter(*state_names)

    def left_on_reading(self, dbapi_connection: Any) -> str | None:
        pgconn = dbapi_connection.pgconn  # each task looks: the driver's own `info` costs it ten times as much
        if pgconn.transaction_status != IDLE:
            return "a transaction is open"
        return f"{DEFAULT_READ_ONLY} is off" if pgconn.parameter_status(_DEFAULT_NAME) == b"off" else None

    def follow_transactions(self, engine: Engine) -> None:
        # Made as one of ours, each statement costs what it does without; one that is changed later costs 3 % more.
        from .followed_psycopg import FollowedConnection

        if type(engine.dialect).connect is DefaultDialect.connect:
            engine.dialect.connect = FollowedConnection.connect  # type: ignore[method-assign, assignment]

    def follow(self, dbapi_connection: Any) -> None:
        from .followed_psycopg import follow

        follow(dbapi_connection)  # where a `creator` of the user's has made it

    def leave_uncounted(self, dbapi_connection: Any) -> None:
        dbapi_connection.celery_alchemy_begins = _UNCOUNTED

    def engine_arguments(self, options: DatabaseOptions) -> dict[str, Any]:
        # Who takes a connection back looks at its transaction anyway, and rolls it back where there is one (`settle`).
        given = options.engine_options
        leave = "pool_reset_on_return" in given or options.reset_on_return or {"poolclass", "pool"} & given.keys()
        return {} if leave else {"pool_reset_on_return": None}

    def keep_set_up(self, dbapi_connection: Any) -> None:
        if dbapi_connection.pgconn.transaction_status == IN_TRANSACTION:
            dbapi_connection.commit()
        self.settle(dbapi_connection)

    def settle(self, dbapi_connection: Any) -> None:
        if dbapi_connection.pgconn.transaction_status != IDLE:
            dbapi_connection.rollback()
        dbapi_connection.celery_alchemy_begins = 0

    def began(self, connection: PoolProxiedConnection) -> None:
        connection.dbapi_connection.celery_alchemy_begins = 0  # type: ignore[union-attr]

    def follow_statements(self, dialect: Dialect) -> None:
        def executed(context: Any, statement: str, failed: bool) -> None:
            raw: Any = context.root_connection.connection.dbapi_connection
            # Where it has ended and none has begun, the driver begins the next one, and counts it.
            if not failed and what_ends(statement) and self.status_of(raw) == IN_TRANSACTION and not raw.autocommit:
                raw.celery_alchemy_begins = getattr(raw, "celery_alchemy_begins", 0) + 1

        follow_texts(dialect, executed)

    def what_ended(self, connection: PoolProxiedConnection) -> Ended | None:
        raw: Any = connection.dbapi_connection
        if raw is None:
            return None
        status = raw.pgconn.transaction_status
        if status == REFUSES:
            return FAILED
        return BY_STATEMENT if getattr(raw, "celery_alchemy_begins", 0) > (status != IDLE) else None

    def guard_commits(self, dialect: Dialect, refuse: Callable[[Ended], NoReturn]) -> None:
        """Count from one end to the next: the driver begins with the first statement, so there is no other place."""
        commit, roll_back, what_ended = dialect.do_commit, dialect.do_rollback, self.what_ended
        plain = getattr(commit, "__func__", None) is DefaultDialect.do_commit  # it asks the driver, and no more

        def do_commit(connection: Any) -> None:
            raw = connection.dbapi_connection
            begins = getattr(raw, "celery_alchemy_begins", 0)  # none where it was made before anybody looked
            if raw is None or raw.pgconn.transaction_status != IN_TRANSACTION or begins > 1:
                ended = what_ended(connection)
                if ended is not None:
                    refuse(ended)
            try:
                if plain:
                    raw.commit()
                else:
                    commit(connection)
            finally:  # a COMMIT that fails has ended it too
                raw.celery_alchemy_begins = 0
            (getattr(current_scope(), SCOPE, None) or here()).commits += 1

        def do_rollback(connection: Any) -> None:
            # psycopg 3 rolls nothing back that is idle either, only later. (psycopg2 has a state of its own beside the
            # server's: after a COMMIT that was sent as a statement it must.)
            raw = getattr(connection, "dbapi_connection", connection)
            status = raw.pgconn.transaction_status
            if getattr(raw, "celery_alchemy_begins", 0) > (status != IDLE) or raw.autocommit:
                here().ends += 1
            if status != IDLE:
                roll_back(connection)
            raw.celery_alchemy_begins = 0

        dialect.do_commit, dialect.do_rollback = do_commit, do_rollback  # type: ignore[method-assign, assignment]

    def connect_args(self, url: URL, options: DatabaseOptions) -> dict[str, Any]:
        # A statement prepared on one connection of the server is unknown on the next, or has another's name.
        unprepared = {"prepare_threshold": None} if options.external_pooler else {}
        return super().connect_args(url, options) | unprepared

    def listen(self, engine: Engine, options: DatabaseOptions) -> None:
        super().listen(engine, options)
        if options.reads:
            self._execute_again(engine.dialect)

    def _execute_again(self, dialect: Dialect) -> None:
        """Let a statement of which what was prepared is stale be executed as it is: the server has refused it before
        it did anything, and where each statement commits itself, no transaction is lost with it."""

        def do_execute(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
            try:
                cursor.execute(statement, parameters)
            except Exception as error:
                connection = cursor.connection
                if not is_stale(error, statement) or self.status_of(connection) != IDLE:
                    raise
                self.stop_preparing(connection)
                if context is not None:
                    context.root_connection.connection.invalidate(soft=True)
                cursor.execute(statement, parameters)

        dialect.do_execute = do_execute  # type: ignore[method-assign]

    def stop_preparing(self, dbapi_connection: Any) -> None:
        dbapi_connection.prepare_threshold = None

    def begin_with(self, dbapi_connection: Any, along: Along) -> bool:
        take = getattr(dbapi_connection, "celery_alchemy_begin_with", None)
        return take is not None and bool(take(along))

    def commit_with(self, dialect: Dialect, dbapi_connection: Any, along: Along) -> bool:
        take = getattr(dbapi_connection, "celery_alchemy_commit_with", None)
        return take is not None and bool(take(along))

    def looks_alone(self, dialect: Dialect) -> bool:
        return True

    def look_alone(self, dialect: Dialect, connection: PoolProxiedConnection, query: str, values: Any) -> Any:
        raw: Any = connection.dbapi_connection
        own = connection.driver_connection or raw  # on an event loop SQLAlchemy has put its own around it
        # What the driver's property sets; each task looks, and would pay a tenth of the SELECT for that twice.
        own._autocommit = True
        try:
            with closing(raw.cursor()) as cursor:
                cursor.execute(query, values)
                return cursor.fetchone()
        finally:
            own._autocommit = False

    def session_reset(self) -> SessionReset:
        return PsycopgReset()

    def cancel(self, dbapi_connection: Any, connect: Connect) -> None:
        if self.is_executing(dbapi_connection):
            if hasattr(dbapi_connection, "cancel_safe"):
                dbapi_connection.cancel_safe(timeout=CANCEL_TIMEOUT_S)
            else:
                dbapi_connection.cancel()

    def make_cooperative(self, library: str) -> None:
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


class Pg8000(PostgreSQLDriver):
    """pg8000, which is written in Python."""

    cooperative: bool = True

    # Tried on pg8000 1.31; without it a swallowed error is committed as a ROLLBACK, without a word.
    status_of: Callable[[Any], Any] = staticmethod(
        lambda dbapi_connection: getattr(dbapi_connection, "_transaction_status", None)
    )
    failed_status: bytes = b"E"
    state_names: tuple[str, ...] = ("autocommit", "_transaction_status")
    state_of: Callable[[Any], Any] = operator.attrgetter(*state_names)

    def parameter(self, dbapi_connection: Any, name: str) -> str | None:
        found: str | None = dbapi_connection.parameter_statuses.get(name)
        return found

    def startup_options(self, dbapi_connection: Any) -> str:
        return ""  # it keeps none


def _level_name(level: Any) -> str | None:
    """Return the name of an isolation level: psycopg 3 has an enum, psycopg2 a number."""
    return _LEVELS[level] if type(level) is int else getattr(level, "name", None)


DRIVERS: dict[str, Driver] = {"psycopg": Psycopg(), "pg8000": Pg8000()}
