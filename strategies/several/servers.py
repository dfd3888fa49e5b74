"""What a server knows of two-phase transactions: who it is, what it has prepared, and how a transaction has ended.

PostgreSQL keeps for every transaction whether it was committed. The transactions of the other databases have the
decider's transaction id in their names, so anybody can ask what was decided, at any time.

MySQL and MariaDB keep nothing of a transaction that is over, but while it is prepared it is there, and while its
connection lives no other connection can use its name. There to be prepared is the decision: the decider is prepared
last, when all others are, and committed last, when all others are.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from ..drivers.base import code_of
from ..errors import CeleryAlchemyError
from .names import Name, fingerprint

_IDENTITY = "celery_alchemy.identity"
"""Key in `Connection.info`, which lasts as long as the connection to the server."""

#: Executes a statement without parameters, and returns its rows.
Ask = Callable[[str], Sequence[Any]]


class TwoPhaseUnavailable(CeleryAlchemyError):
    """A server refuses what two-phase commit needs, and always will."""


class Server(ABC):
    """What differs from server to server. Each method pays a round trip or more, unless it says otherwise."""

    prepares_first: bool
    """Its transaction, where it decides, is prepared before the others, and committed before them; False: after."""
    gone: frozenset[str | int]
    """The codes of the error that there is no such prepared transaction (or that another connection still has it)."""

    @abstractmethod
    def ask_identity(self, ask: Ask, dialect: Dialect) -> str:
        """Return what tells this server and database from all others, whichever way one connects."""

    @abstractmethod
    def new_token(self, engine: Engine, databases: int) -> str:
        """Return the token of a transaction that decides itself, of an app with so many databases; pays nothing."""

    @abstractmethod
    def token_of(self, connection: Connection, name: Name) -> str:
        """Return the token for those that the transaction `name`, now open on `connection`, decides for."""

    @abstractmethod
    def is_led_by(self, name: Name, engine: Engine, databases: int) -> bool:
        """Tell whether `name`, found on this server, is of an app like this one; pays nothing."""

    @abstractmethod
    def prepared(self, connection: Connection) -> dict[str, str]:
        """Return the names of what is prepared, each with the token of those it decides for, as far as it has one."""

    @abstractmethod
    def has_committed(self, connection: Connection, database: str, token: str) -> bool | None:
        """Tell what was decided, for good; None: nothing yet, and it may still be either.

        Args:
            connection: To the database that decides, in autocommit mode.
            database: Its name, as in the names of its transactions.
            token: What those it decides for have in their names.
        """

    def listen(self, engine: Engine) -> None:  # noqa: B027 - most need none
        """Put the listeners on `engine` that its transactions need."""

    def prepare_as(self, connection: Connection, name: str) -> None:
        """Prepare the transaction of `connection`, that the driver began under another name; ended with `recover`."""
        raise NotImplementedError("a name cannot be changed on this server")

    def has_written(self, connection: Connection) -> bool:
        """Tell whether the transaction of `connection` has, as far as the server says."""
        return True

    def identity(self, connection: Connection) -> str:
        """Return what `ask_identity` does, asked once for each connection to the server."""
        info: Any = connection.info
        found: str | None = info.get(_IDENTITY)
        if found is None:
            found = info[_IDENTITY] = self.ask_identity(
                lambda sql: connection.exec_driver_sql(sql).all(), connection.dialect
            )
        return found

    def fingerprint(self, connection: Connection, database: str) -> str:
        """Return what stands for the database of `connection` in the names of transactions."""
        return fingerprint(database, self.identity(connection))


class PostgreSQL(Server):
    """It knows of each transaction how it has ended."""

    prepares_first = True
    gone: frozenset[str | int] = frozenset({"42704"})

    def ask_identity(self, ask: Ask, dialect: Dialect) -> str:
        # Asked first: an error would end the transaction that goes on here.
        ((allowed, role),) = ask("SELECT has_function_privilege('pg_control_system()', 'EXECUTE'), current_user")
        if not allowed:
            raise TwoPhaseUnavailable(
                f"The server does not tell the role {role!r} who it is, so alchemy_two_phase cannot work. "
                f'Let it: GRANT EXECUTE ON FUNCTION pg_control_system() TO "{role}".'
            )
        ((server, database),) = ask(
            "SELECT system_identifier, oid FROM pg_control_system(), pg_database WHERE datname = current_database()"
        )
        return f"postgresql/{server}/{database}"

    def new_token(self, engine: Engine, databases: int) -> str:
        return f"p.{uuid.uuid4().hex[:16]}"

    def token_of(self, connection: Connection, name: Name) -> str:
        return f"x.{connection.scalar(text('SELECT txid_current()')):x}"

    def is_led_by(self, name: Name, engine: Engine, databases: int) -> bool:
        return name.token.startswith("p.")

    def prepared(self, connection: Connection) -> dict[str, str]:
        # The list is of the whole cluster, but each can only be resolved in its own database. It has 32 bits of the id.
        found = connection.execute(
            text(
                "SELECT gid, (((t.now >> 32) - CASE WHEN low > (t.now & 4294967295) THEN 1 ELSE 0 END) << 32) | low"
                " FROM (SELECT gid, transaction::text::bigint AS low FROM pg_prepared_xacts"
                " WHERE database = current_database()) AS p,"
                " (SELECT txid_snapshot_xmax(txid_current_snapshot()) AS now) AS t"
            )
        )
        return {name: f"x.{xid:x}" for name, xid in found}

    def has_written(self, connection: Connection) -> bool:
        return connection.scalar(text("SELECT txid_current_if_assigned()")) is not None

    def prepare_as(self, connection: Connection, name: str) -> None:
        dbapi_connection: Any = connection.connection.dbapi_connection
        cursor = dbapi_connection.cursor()
        cursor.execute(f"PREPARE TRANSACTION '{name}'")
        cursor.close()
        dbapi_connection.tpc_rollback()  # nothing is left to roll back: the driver is to forget the name it began with

    def has_committed(self, connection: Connection, database: str, token: str) -> bool | None:
        status = connection.scalar(text(f"SELECT txid_status({int(token[2:], 16)})"))
        return {"committed": True, "aborted": False}.get(status)


class MySQL(Server):
    """MySQL and MariaDB. A prepared transaction is there; one that is over leaves nothing."""

    prepares_first = False
    gone: frozenset[str | int] = frozenset({1397})  # XAER_NOTA
    _TAKEN = 1440  # XAER_DUPID
    _WHO = "SHOW GLOBAL VARIABLES WHERE Variable_name IN ('server_uid', 'server_uuid', 'hostname', 'port')"

    def ask_identity(self, ask: Ask, dialect: Dialect) -> str:
        known = {str(name): str(value) for name, value in ask(self._WHO)}
        # MariaDB has an identity of its own since 10.6.
        server = known.get("server_uuid") or known.get("server_uid") or f"{known['hostname']}:{known['port']}"
        return f"mysql/{server}/{dialect.default_schema_name}"

    def listen(self, engine: Engine) -> None:
        """Ask each new connection who it is: later its transaction may be in the middle of a long result."""

        def connected(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
            def ask(sql: str) -> Sequence[Any]:
                cursor = dbapi_connection.cursor()
                try:
                    cursor.execute(sql)
                    found: Sequence[Any] = cursor.fetchall()
                    return found
                finally:
                    cursor.close()

            info: Any = record.info
            info[_IDENTITY] = self.ask_identity(ask, engine.dialect)

        event.listen(engine, "connect", connected)

    def new_token(self, engine: Engine, databases: int) -> str:
        return f"n.{uuid.uuid4().hex[:12]}{self._mark(engine, databases)}"

    def token_of(self, connection: Connection, name: Name) -> str:
        return name.token

    def is_led_by(self, name: Name, engine: Engine, databases: int) -> bool:
        return name.token.startswith("n.") and name.token.endswith(self._mark(engine, databases))

    def prepared(self, connection: Connection) -> dict[str, str]:
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in connection.recover_twophase()]
        return {name: name.rpartition("/")[2] for name in names}

    def has_committed(self, connection: Connection, database: str, token: str) -> bool | None:
        name = str(Name(database, None, token))
        if name in self.prepared(connection):
            return True
        try:
            connection.execute(text("XA START :name"), {"name": name})
        except DBAPIError as error:
            if code_of(error.orig) == self._TAKEN:  # type: ignore[arg-type]
                return None  # its connection is open: it may prepare it still
            raise
        connection.execute(text("XA END :name"), {"name": name})
        connection.execute(text("XA ROLLBACK :name"), {"name": name})
        return False  # neither prepared, nor is there a connection that could

    @staticmethod
    def _mark(engine: Engine, databases: int) -> str:
        """Return a fingerprint of the schema: the server lists what is prepared in all of them."""
        schema = getattr(engine.dialect, "default_schema_name", None)
        return fingerprint(str(schema), str(databases))[:6]


_SERVERS: dict[str, Server] = {"postgresql": PostgreSQL(), "mysql": MySQL(), "mariadb": MySQL()}


def server_of(dialect: Dialect) -> Server:
    """Return what is known of the servers of `dialect`, which `can_prepare`."""
    return _SERVERS[dialect.name]


def can_prepare(dialect: Dialect | type[Dialect]) -> bool:
    """Tell whether the databases of this dialect have two-phase commit that is known here."""
    kind = dialect if isinstance(dialect, type) else type(dialect)
    return dialect.name in _SERVERS and kind.do_begin_twophase is not DefaultDialect.do_begin_twophase
