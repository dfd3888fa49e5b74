"""Settings of PostgreSQL that hold until a transaction ends: neither the next task nor a pooler sees them."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction

from ..engines.statement_timeout import milliseconds
from ..hooks import OpenUnit, UnitHook
from ..names import in_ascii
from ..options import DatabaseOptions

LONGEST_NAME = 63
"""Bytes of an application_name; the server cuts off the rest."""
_ID_LENGTH = 8
_DOLLARS = "numeric_dollar"
"""How asyncpg writes parameters."""


class TransactionSettings(UnitHook):
    """Lets every transaction of a unit of work have the settings that `options` asks for: one round trip for all."""

    __slots__ = ("_options",)

    def __init__(self, options: DatabaseOptions) -> None:
        self._options = options

    def opened(self, unit: OpenUnit, session: Session) -> None:
        def after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
            if transaction.parent is not None or connection.dialect.name != "postgresql":
                return
            settings = list(_settings(self._options, unit.label))
            calls = _calls(len(settings), dollars=connection.dialect.paramstyle == _DOLLARS)
            connection.exec_driver_sql(f"SELECT {calls}", tuple(part for setting in settings for part in setting))

        event.listen(session, "after_begin", after_begin)


def _calls(count: int, *, dollars: bool) -> str:
    if not dollars:
        return ", ".join(["set_config(%s, %s, true)"] * count)
    return ", ".join(f"set_config(${2 * n + 1}, ${2 * n + 2}, true)" for n in range(count))


def _settings(options: DatabaseOptions, label: str) -> Iterable[tuple[str, str]]:
    if options.application_name:
        yield "application_name", shortened(label)
    if options.timeout_in_transactions:
        yield "statement_timeout", str(milliseconds(options.statement_timeout_s or 0))


def shortened(label: str) -> str:
    """Return `label`, `task name[task id]`, in at most 63 bytes: the beginning of the id, and what fits of the name.

    In ASCII, which every encoding of a database has; PostgreSQL itself shows nothing else of an application_name.
    """
    label = in_ascii(label)
    if len(label) <= LONGEST_NAME:
        return label
    name, bracket, task_id = label.rpartition("[")
    end = f"[{task_id[:_ID_LENGTH]}]" if bracket else ""
    return (name if bracket else label)[: LONGEST_NAME - len(end)] + end
