"""psycopg2: BEGIN travels with the first statement of a transaction.

An idle connection is in the driver's own transaction mode. `execute` of an ordinary statement on it switches the driver
to autocommit and sends `BEGIN;` and the statement in one text; COMMIT and ROLLBACK are then sent as statements, for the
driver's own do nothing in autocommit, and switch back. Whatever else comes first (a server-side cursor, `executemany`,
COPY, `callproc`, `tpc_begin()`, a cursor of another class) lets the driver begin, in a round trip of its own.

While such a transaction is open, the connection answers as it would without: `autocommit` is False, `status` says that
it is in a transaction, settings of the session are refused. What does not work in it is `lobject()`, which the driver
refuses in autocommit; as the first thing of a transaction it does.

Tried with psycopg2 2.9.13. Nothing private of it is used.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import psycopg2
from psycopg2 import extensions, sql

from .along import Along
from .followed_psycopg2 import FollowedConnection
from .one_statement import is_one_statement

IDLE = extensions.TRANSACTION_STATUS_IDLE
READY, BEGUN = extensions.STATUS_READY, extensions.STATUS_BEGIN
SYNTAX_ERROR = "42601"
DEFAULT = "DEFAULT"
_LEVELS = {
    extensions.ISOLATION_LEVEL_READ_UNCOMMITTED: "READ UNCOMMITTED",
    extensions.ISOLATION_LEVEL_READ_COMMITTED: "READ COMMITTED",
    extensions.ISOLATION_LEVEL_REPEATABLE_READ: "REPEATABLE READ",
    extensions.ISOLATION_LEVEL_SERIALIZABLE: "SERIALIZABLE",
}
_Characteristics = tuple[int | None, bool | None, bool | None]
_NONE: _Characteristics = (None, None, None)


class BeginningConnection(FollowedConnection):
    """A connection that can send BEGIN along with a statement; cursors of `beginning(...)` ask it to."""

    _begun: _Characteristics | None = None
    """Isolation level, read-only and deferrable of the transaction that was begun with a statement, and of the next
    ones; None where there is none, and the driver knows them itself."""

    # -- the transaction ----------------------------------------------------------------------------------------------

    def may_begin_along(self, query: object) -> bool:
        """Tell whether BEGIN may go with `query`, on a connection that is in no transaction."""
        self._settle()
        return not super().autocommit and super().status == READY and is_one_statement(query)

    celery_alchemy_along: Along | None = None
    """What is to be sent with the first statement of the transaction."""
    celery_alchemy_ending: Along | None = None
    """What is to be sent with the COMMIT."""

    def celery_alchemy_begin_with(self, along: Along) -> bool:
        """Send `along` together with the first statement that takes BEGIN along."""
        if self.get_transaction_status() != IDLE or self.autocommit:
            return False
        self.celery_alchemy_along = along
        return True

    def celery_alchemy_commit_with(self, along: Along) -> bool:
        """Send `along` together with the next COMMIT."""
        if not self.has_begun_along:
            return False
        self.celery_alchemy_ending = along
        return True

    def text_of(self, along: Along) -> bytes:
        """Return `along` with its values in it."""
        along.sent = True
        with super().cursor(cursor_factory=extensions.cursor) as cursor:
            return bytes(cursor.mogrify(along.query, along.values))

    def begin_along(self) -> str:
        """Return the BEGIN to send before a statement; the driver sends none from now on."""
        characteristics = super().isolation_level, super().readonly, super().deferrable
        if characteristics != _NONE:
            # First by itself: a driver that is switched to autocommit sends what was set as settings of the session.
            super().set_session(DEFAULT, DEFAULT, DEFAULT)
        super().set_session(autocommit=True)
        self._begun = characteristics
        return _spelled(characteristics)

    @property
    def has_begun_along(self) -> bool:
        """A transaction is open that was begun with its first statement."""
        self._settle()
        return self._begun is not None

    def _settle(self, *, ends: int = 1) -> None:
        """Let the driver begin transactions again, where the one begun by us is over (`ends`: 0 where it has never
        begun)."""
        if self._begun is None or self.get_transaction_status() != IDLE:
            return
        level, readonly, deferrable = self._begun
        self._begun = None
        self.celery_alchemy_ends: int = self.celery_alchemy_ends + ends
        if (level, readonly, deferrable) == _NONE:
            super().set_session(autocommit=False)
        else:
            super().set_session(
                level or DEFAULT,
                DEFAULT if readonly is None else readonly,
                DEFAULT if deferrable is None else deferrable,
                autocommit=False,
            )

    def fail(self) -> None:
        """Begin a transaction that has failed, as the driver would have: the server has refused to read the text, BEGIN
        included, and whoever ignores that error must not go on as if nothing had happened."""
        self._settle()
        with super().cursor(cursor_factory=extensions.cursor) as cursor:
            try:
                cursor.execute("the statement before this one has a syntax error")
            except psycopg2.ProgrammingError:
                return

    def commit(self) -> None:
        if self.has_begun_along:
            self._end("COMMIT")
        else:
            super().commit()

    def rollback(self) -> None:
        if self.has_begun_along:
            self._end("ROLLBACK")
        else:
            super().rollback()

    def _end(self, command: str) -> None:
        try:
            with super().cursor(cursor_factory=extensions.cursor) as cursor:
                ending, self.celery_alchemy_ending = self.celery_alchemy_ending, None
                if ending is None or command != "COMMIT" or not ending.is_due():
                    cursor.execute(command)
                    return
                try:
                    cursor.execute(self.text_of(ending) + b";COMMIT")
                except psycopg2.Error as error:
                    ending.failed(error)
                    raise
        finally:
            if not self.closed:
                self._settle()

    _entered = False

    def __enter__(self) -> BeginningConnection:
        # The driver's own lets BEGIN be sent in autocommit too: right for a user's autocommit, one too many for ours.
        if self.autocommit:
            return super().__enter__()
        if self._entered:
            raise psycopg2.ProgrammingError("the connection cannot be re-entered recursively")
        self._entered = True
        self.note_block()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> Any:
        if not self._entered:
            return super().__exit__(kind, error, traceback)
        self._entered = False
        try:
            if kind is None:
                self.commit()
            else:
                self.rollback()
        finally:
            self.end_block()

    # -- what the driver would say or do in a transaction --------------------------------------------------------------

    @property
    def autocommit(self) -> bool:
        return not self.has_begun_along and bool(super().autocommit)

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self._refuse_within("autocommit")
        extensions.connection.autocommit.__set__(self, value)

    @property
    def isolation_level(self) -> int | None:
        return self._begun[0] if self._begun is not None else super().isolation_level

    @isolation_level.setter
    def isolation_level(self, value: Any) -> None:
        self._refuse_within("isolation_level")
        extensions.connection.isolation_level.__set__(self, value)

    @property
    def readonly(self) -> bool | None:
        return self._begun[1] if self._begun is not None else super().readonly

    @readonly.setter
    def readonly(self, value: Any) -> None:
        self._refuse_within("readonly")
        extensions.connection.readonly.__set__(self, value)

    @property
    def deferrable(self) -> bool | None:
        return self._begun[2] if self._begun is not None else super().deferrable

    @deferrable.setter
    def deferrable(self, value: Any) -> None:
        self._refuse_within("deferrable")
        extensions.connection.deferrable.__set__(self, value)

    @property
    def status(self) -> int:
        return BEGUN if self.has_begun_along else super().status  # type: ignore[no-any-return]

    def set_session(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_within("set_session")
        super().set_session(*args, **kwargs)

    def set_isolation_level(self, level: int | None) -> None:
        if self.has_begun_along:
            self.rollback()  # so does the driver
        super().set_isolation_level(level)

    def set_client_encoding(self, encoding: str) -> None:
        if self.has_begun_along:
            self.rollback()  # so does the driver
        super().set_client_encoding(encoding)

    def reset(self) -> None:
        if self.has_begun_along:
            self.rollback()
        super().reset()

    def tpc_begin(self, xid: Any) -> None:
        self._refuse_within("tpc_begin")
        super().tpc_begin(xid)

    def _refuse_within(self, name: str) -> None:
        if self.has_begun_along:
            raise psycopg2.ProgrammingError(f"{name} cannot be used inside a transaction")


class _Beginning(extensions.cursor):  # type: ignore[misc]
    """The first statement of a transaction takes BEGIN along."""

    def execute(self, query: Any, vars: Any = None) -> None:
        connection: BeginningConnection = self.connection
        if self.name is not None:
            if connection.has_begun_along:
                self._declare(query, vars)
            else:
                super().execute(query, vars)
        elif connection.get_transaction_status() != IDLE or not connection.may_begin_along(query):
            super().execute(query, vars)
        else:
            along, connection.celery_alchemy_along = connection.celery_alchemy_along, None
            try:
                if along is not None and along.is_due():
                    own = self.mogrify(query, vars)
                    begin = connection.begin_along().encode()
                    super().execute(b";".join((begin, connection.text_of(along), own)))
                else:
                    super().execute(f"{connection.begin_along()};{query}", vars)
            except psycopg2.Error as error:
                if along is not None and along.sent:
                    along.failed(error)
                if error.pgcode == SYNTAX_ERROR and not connection.closed and not connection.has_begun_along:
                    connection.fail()
                raise
            finally:
                if not connection.closed:
                    connection._settle(ends=0)

    def _declare(self, query: Any, vars: Any) -> None:
        """Open this server-side cursor: the driver refuses to in autocommit, but fetches from one that is open."""
        if isinstance(query, sql.Composable):
            query = query.as_string(self)
        scroll = {True: "SCROLL ", False: "NO SCROLL ", None: ""}[self.scrollable]
        hold = "WITH HOLD " if self.withhold else ""
        name = extensions.quote_ident(self.name, self)
        statement = f"DECLARE {name} {scroll}CURSOR {hold}FOR ".encode() + self.mogrify(query, vars)
        with self.connection.cursor(cursor_factory=extensions.cursor) as cursor:
            cursor.execute(statement)


@cache
def beginning(factory: Any) -> Any:
    """Return a class of cursors like `factory`, whose first statement of a transaction takes BEGIN along."""
    if factory is extensions.cursor:
        return _Beginning
    return type(f"Beginning{factory.__name__}", (_Beginning, factory), {})


def connect(stock: object, *args: Any, cursor_factory: Any = extensions.cursor, **kwargs: Any) -> Any:
    """Connect as `psycopg2.connect` does, to a connection that begins along with the first statement."""
    factory = beginning(cursor_factory)
    kwargs["connection_factory"] = BeginningConnection
    return psycopg2.connect(*args, cursor_factory=factory, **kwargs)


def _spelled(characteristics: _Characteristics) -> str:
    level, readonly, deferrable = characteristics
    parts = ["BEGIN"]
    if level is not None:
        parts.append(f"ISOLATION LEVEL {_LEVELS[level]}")
    if readonly is not None:
        parts.append("READ ONLY" if readonly else "READ WRITE")
    if deferrable is not None:
        parts.append("DEFERRABLE" if deferrable else "NOT DEFERRABLE")
    return " ".join(parts)
