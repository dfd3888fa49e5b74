"""Which features are on for which options: the one list of them, in the order in which they follow."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

from ..base import SessionStrategy
from ..drivers.awaited_urls import awaited_dialect
from ..engines.factory import EngineHook
from ..engines.statement_timeout import limit_statements
from ..entry import UnitOptions
from ..hooks import UnitHook
from ..options import DatabaseOptions
from ..several.two_phase import name_transactions
from .first_statement import begin_with_first_statement, describe
from .read_only import IN_TRANSACTION, ReadOnly, ReadOnlyHook, kind_of, set_read_only_at_connect
from .reset_on_return import reset_on_return
from .transaction_settings import TransactionSettings
from .uncommitted import RollBackUnasked

#: Called for every Engine; each looks at the options and does nothing where it is off.
ENGINE_HOOKS: tuple[EngineHook, ...] = (
    set_read_only_at_connect,
    begin_with_first_statement,
    limit_statements,
    name_transactions,
    reset_on_return,
)


def phrases(options: DatabaseOptions, url: URL, *, awaits: bool = False) -> tuple[str, ...]:
    """Return what features have to say in the log line at worker start.

    Args:
        awaits: Of the tasks that are `async def`.
    """
    dialect = awaited_dialect(url) if awaits else url.get_dialect()
    begin = describe(options.begin_with_first_statement, url, dialect, options.engine_options)
    reset = "each connection's session is reset when it comes back" if options.reset_on_return else ""
    return tuple(filter(None, (begin, reset)))


def unit_options(
    options: DatabaseOptions,
    strategy: Callable[[], SessionStrategy],
    *,
    commits: bool,
    read_only: ReadOnly,
    always: tuple[UnitHook, ...] = (),
    extra: tuple[UnitHook, ...] = (),
    session_kind: type[Session] | None = None,
) -> UnitOptions:
    """Return how units of work are treated; its hooks are empty in the common case.

    Args:
        options: Of the database.
        strategy: Returns its strategy.
        commits: False: a good ending rolls back.
        read_only: As the task asks for.
        always: Follow every unit of work of the process: metrics.
        extra: Follow those of one task.
        session_kind: A class that its Sessions are made of too.
    """
    if read_only and options.external_pooler:
        read_only = IN_TRANSACTION  # a connection cannot be set read-only: other clients use it too
    hooks: list[UnitHook] = list(always)
    if options.sets_in_transactions and read_only is not True:
        hooks.append(TransactionSettings(options))
    if read_only:
        hooks.append(ReadOnlyHook(read_only, strategy))
    if not commits and read_only is not True:
        hooks.append(RollBackUnasked())
    kind = kind_of(read_only) if read_only else session_kind
    return UnitOptions(commits, read_only, (*hooks, *extra), extra, kind)
