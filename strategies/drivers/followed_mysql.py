"""PyMySQL and mysqlclient: a connection that notices when the server has rolled its transaction back.

A deadlock rolls back all of it, other errors do with some settings, and the next statement begins a new transaction
without a word. An error comes without the server's status flags, so after one the server is asked, in a round trip.

Tried with PyMySQL 1.2.4 and mysqlclient 2.3.2. Nothing private of them is used: `query`, `commit`, `rollback` and
`ping` are public.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from ..interrupts import is_interrupt
from .base import Ended, code_of

_IN_TRANSACTION = 1  # SERVER_STATUS_IN_TRANS
#: What a statement may do to its transaction, by its first words. One that runs others (a procedure, a prepared
#: statement, a block, an executable comment) may end it and begin none.
_KIND = re.compile(
    rb"(?P<rollback>rollback\b(?!\s+(?:work\s+)?to\b))"
    rb"|(?P<runs>call\b|execute\b|begin\s+not\b|if\b|case\b|for\b|loop\b|while\b|repeat\b|/\*M?!)"
    rb"|(?P<changes>insert|update|delete|replace|merge|load)|(?P<may_change>with\b)"
    rb"|(?P<begins>begin\b|start\s+transaction\b)|(?P<commits>commit\b)|(?P<sets>set\b)"
    rb"|(?P<defines>(?:create|drop)\b(?!\s+temporary\b)|(?:alter|truncate|rename|grant|revoke|analyze|optimize|repair"
    rb"|check|cache|flush|reset|lock\s+tables?|unlock|install|uninstall|xa)\b)",
    re.IGNORECASE,
)
_LEADING = re.compile(rb"(?:\s|/\*(?!M?!).*?\*/|(?:--\s|#)[^\n]*(?:\n|\Z))*", re.DOTALL)
#: Of a statement, what its kind is read from.
_LONGEST = 40
_CHANGES_LATER = re.compile(rb"\b(?:insert|update|delete|replace)\b", re.IGNORECASE)
_AUTOCOMMIT = re.compile(rb"\bautocommit\b|\bpassword\b", re.IGNORECASE)
_LETS_WRITE = re.compile(rb"\bread\s+write\b|\b(?:tx|transaction)_read_only\b", re.IGNORECASE)
#: Errors of one statement, which undo that alone: a key that is taken, a foreign key, a name, the syntax, a NULL.
_OF_A_STATEMENT = frozenset({1048, 1054, 1062, 1064, 1146, 1364, 1406, 1451, 1452})
#: The victim of a deadlock: all of its transaction is undone, whatever the server says of it.
_OF_A_TRANSACTION = frozenset({1213, 1614})
#: Kinds of statements that commit what was before them, or may.
_MAY_COMMIT = frozenset({"commits", "begins", "defines", "sets_autocommit", "runs"})
_OPEN = "a transaction is open"
BY_ROLLBACK = Ended("ROLLBACK was executed")
BY_OTHERS = Ended("what CALL, EXECUTE or a block has executed ended the transaction")
BY_CONNECTING = Ended("the driver has begun another session (ping(), connect() or change_user())")


class Followed:
    """What a connection of either driver keeps of its transaction."""

    celery_alchemy_ended: Ended | None = None
    """Why the transaction that SQLAlchemy began is over; None where it is not, as far as is known."""
    celery_alchemy_changed: bool = False
    """Something was written in it; kept where the driver has no status flags."""
    celery_alchemy_left: str | None = None
    """What statements have left that matters where only reading is allowed; an open transaction until it is ended."""
    celery_alchemy_commits: int = 0
    """COMMITs since SQLAlchemy began its transaction, of code and of statements that commit what was before them."""
    celery_alchemy_unsure: bool = False
    """A statement may have ended it, and the driver does not say."""

    def query(self, sql: Any, *args: Any, **kwargs: Any) -> Any:
        """Execute `sql`, of whichever cursor."""
        if self.celery_alchemy_unsure:
            self.make_sure()
        open_before = self._is_open()
        try:
            found = super().query(sql, *args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            if open_before and self.celery_alchemy_ended is None and self._is_undone(error, kind_of(sql)):
                self.note_undone(error)
            raise
        kind = kind_of(sql)
        if kind is not None:
            self._note(kind, open_before)
        return found

    def _note(self, kind: str, open_before: bool) -> None:
        if open_before and kind in _MAY_COMMIT:
            self.celery_alchemy_commits += 1
        if kind in {"rollback", "commits"}:
            if kind == "rollback":
                self._may_be_over(open_before, BY_ROLLBACK, known=True)
            if self.celery_alchemy_left == _OPEN:
                self.celery_alchemy_left = None
        elif kind == "begins":
            self.celery_alchemy_left = self.celery_alchemy_left or _OPEN
        elif kind == "lets_write":
            self.celery_alchemy_left = "it was set to READ WRITE"
        elif kind in {"runs", "changes"}:
            self.celery_alchemy_changed = True
            if kind == "runs":
                self._may_be_over(open_before, BY_OTHERS)

    def ping(self, *args: Any, **kwargs: Any) -> Any:
        """Look whether the server is there; the driver may connect anew."""
        number, autocommit = self.thread_id(), self.get_autocommit()  # type: ignore[attr-defined]
        open_before = self._is_open()
        found = super().ping(*args, **kwargs)  # type: ignore[misc]
        if self.thread_id() != number:  # type: ignore[attr-defined]
            self._begin_anew(open_before, autocommit)
        return found

    def _begin_anew(self, open_before: bool, autocommit: bool) -> None:
        self._may_be_over(open_before, BY_CONNECTING, known=True)
        self.celery_alchemy_left = None
        if open_before and not autocommit and self.get_autocommit():  # type: ignore[attr-defined]
            # What follows must not be committed by itself.
            type(self).autocommit(self, False)  # type: ignore[attr-defined]

    def make_sure(self) -> None:
        """Ask whether the transaction is still open, where a statement may have ended it. A round trip."""
        self.celery_alchemy_unsure = False
        try:
            if self.celery_alchemy_ended is None and not self._asks_whether_open():
                self.celery_alchemy_ended = BY_OTHERS
        except Exception as error:  # it is lost, and says so itself
            if is_interrupt(error):
                raise

    def _may_be_over(self, open_before: bool, why: Ended, *, known: bool = False) -> None:
        if not open_before or self.celery_alchemy_ended is not None:
            return
        if known or (hasattr(self, "server_status") and not self._is_open()):
            self.celery_alchemy_ended = why
        elif not hasattr(self, "server_status"):
            self.celery_alchemy_unsure = True  # more results may come before the server can be asked

    def commit(self) -> None:
        """Commit, for SQLAlchemy or for code that has this connection."""
        self.celery_alchemy_commits += 1
        super().commit()  # type: ignore[misc]

    def rollback(self) -> None:
        """Roll back, for SQLAlchemy or for code that has this connection."""
        open_before = self._is_open()
        super().rollback()  # type: ignore[misc]
        if open_before:
            self.celery_alchemy_ended = BY_ROLLBACK

    def _is_open(self) -> bool:
        flags = getattr(self, "server_status", None)
        return bool(flags & _IN_TRANSACTION) if isinstance(flags, int) else self.celery_alchemy_changed

    def note_undone(self, error: Exception) -> None:
        """The server has rolled the transaction back because of `error`."""
        self.celery_alchemy_ended = Ended(error=error)

    def tells_undone(self, error: Exception, kind: str | None) -> bool | None:
        """Tell whether `error` of a statement of this `kind` undoes all of the transaction; None: the server knows."""
        code = code_of(error)
        if code in _OF_A_TRANSACTION:
            return True
        if code in _OF_A_STATEMENT and kind != "runs":  # a procedure may roll back before it lets the error out
            return False
        return None

    def _is_undone(self, error: Exception, kind: str | None) -> bool:
        told = self.tells_undone(error, kind)
        if told is not None:
            return told
        try:
            return not self._asks_whether_open()
        except Exception as failure:
            if is_interrupt(failure):
                raise
            return False  # it is lost, and says so itself

    def _asks_whether_open(self) -> bool:
        if hasattr(self, "server_status"):
            self.ping(reconnect=False)
            return self._is_open()
        cursor = self.cursor()  # type: ignore[attr-defined]
        try:
            cursor.execute("SELECT @@in_transaction")
            return bool(cursor.fetchone()[0])
        finally:
            cursor.close()


class FollowedPyMySQL(Followed):
    """The same with the server's status flags."""

    def next_result(self, *args: Any, **kwargs: Any) -> Any:
        """Read the next result of a procedure: what it has executed since may have ended the transaction."""
        open_before = self._is_open()
        found = super().next_result(*args, **kwargs)  # type: ignore[misc]
        self._may_be_over(open_before, BY_OTHERS)
        return found

    def connect(self, *args: Any, **kwargs: Any) -> Any:
        """Connect anew: its transaction is gone, whether the old connection was lost or not."""
        open_before = self._is_open()
        found = super().connect(*args, **kwargs)  # type: ignore[misc]
        self._may_be_over(open_before, BY_CONNECTING, known=True)
        return found


class FollowedMySQLdb(Followed):
    """The same in C, where the flags are not shown: what may have ended the transaction is asked about later."""

    def change_user(self, *args: Any, **kwargs: Any) -> Any:
        """Begin another session."""
        open_before, autocommit = self._is_open(), self.get_autocommit()  # type: ignore[attr-defined]
        found = super().change_user(*args, **kwargs)  # type: ignore[misc]
        self._begin_anew(open_before, autocommit)
        return found


def follow(connection: Any) -> None:
    """Let `connection` notice what becomes of its transaction."""
    if not isinstance(connection, Followed):
        connection.__class__ = _followed(type(connection))  # type: ignore[arg-type]


@cache
def _followed(kind: type[Any]) -> type[Any]:
    followed = FollowedMySQLdb if hasattr(kind, "change_user") else FollowedPyMySQL
    return type(kind.__name__, (followed, kind), {"__module__": kind.__module__})


def kind_of(sql: Any) -> str | None:
    """Return what `sql` may do to its transaction: "rollback", "runs", "changes" and the like, or None."""
    if not sql[:1].isalpha():
        sql = _text_of(sql)
        sql = sql[_LEADING.match(sql).end() :]  # type: ignore[union-attr]
    found = _KIND.match(_text_of(sql[:_LONGEST]))
    kind = found.lastgroup if found is not None else None
    if kind == "may_change":
        return "changes" if _CHANGES_LATER.search(_text_of(sql)) else None
    if kind == "sets":
        words = _text_of(sql)
        return "lets_write" if _LETS_WRITE.search(words) else "sets_autocommit" if _AUTOCOMMIT.search(words) else None
    return kind


def _text_of(sql: Any) -> bytes:
    return sql.encode(errors="replace") if isinstance(sql, str) else bytes(sql)
