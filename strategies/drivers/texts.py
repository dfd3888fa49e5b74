"""What begins and what ends transactions: statements given as text may. Those that SQLAlchemy compiles end none."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine.default import DefaultDialect

#: Called with a statement's context of SQLAlchemy and its text, and whether it has failed.
Executed = Callable[[Any, str, bool], None]

KNOWN_TEXTS = 500  # As many as SQLAlchemy keeps compiled, of which each may be as long

ROLLBACK, COMMIT = "ROLLBACK", "COMMIT"
_MAY_END = re.compile(r"\b(?:rollback|abort|commit|end|prepare)\b", re.IGNORECASE)
#: What is no statement: comments, strings, quoted names; and the body of a function, which ends nothing.
_NO_STATEMENT = re.compile(
    r"--[^\n]*|/\*.*?\*/|\be'(?:[^'\\]|''|\\.)*'|'(?:[^']|'')*'|\"[^\"]*\"|\$(\w*)\$.*?\$\1\$|\bbegin\s+atomic\b.*",
    re.IGNORECASE | re.DOTALL,
)
_ENDS = re.compile(
    r"\s*(?:(?P<rollback>(?:rollback|abort)\b(?!\s+(?:(?:work|transaction)\s+)?to\b))"
    r"|(?:commit|end)\b|prepare\s+transaction\b)(?!\s+prepared\b)",
    re.IGNORECASE,
)


#: Tells, at the cost of one look, whether the first statement of a text may be one that ends a transaction; a later one
#: comes after a semicolon.
may_begin_with_end: Callable[[str], object] = re.compile(
    r"\s*(?:rollback|abort|commit|end|prepare|--|/\*)", re.IGNORECASE
).match


def what_ends(statement: str) -> str | None:
    """Return "ROLLBACK" or "COMMIT" where one is among the statements of a text, the first one; None where none is.

    ROLLBACK TO a savepoint is neither.
    """
    if _MAY_END.search(statement) is None:
        return None
    for one in _NO_STATEMENT.sub(" ", statement).split(";"):
        found = _ENDS.match(one)
        if found is not None:
            return ROLLBACK if found["rollback"] else COMMIT
    return None


def follow_texts(dialect: Any, executed: Executed) -> None:
    """Call `executed` after each text, or DDL, that `dialect` is given and that may end a transaction. No other
    statement costs anything.

    Not by a listener: SQLAlchemy would then build what listeners get for every statement.
    """
    without = dialect.do_execute_no_params

    def do_execute_no_params(cursor: Any, statement: Any, context: Any = None) -> None:
        if context is None:
            without(cursor, statement)
        else:
            tell(executed, context, statement, without, cursor, statement, context)

    dialect.do_execute = _following(dialect, executed)
    dialect.do_execute_no_params = do_execute_no_params


def _following(dialect: Any, executed: Executed) -> Callable[..., None]:
    execute = dialect.do_execute
    plain = asks_the_cursor(execute)
    end_none: set[str] = set()  # Texts that end no transaction: most are executed again and again

    def do_execute(cursor: Any, statement: Any, parameters: Any, context: Any = None) -> None:
        if context is not None and (context.is_text or context.isddl) and statement not in end_none:
            if ";" in statement or may_begin_with_end(statement):
                tell(executed, context, statement, execute, cursor, statement, parameters, context)
                return
            if len(end_none) >= KNOWN_TEXTS:
                end_none.clear()
            end_none.add(statement)
        if plain:
            cursor.execute(statement, parameters)
        else:
            execute(cursor, statement, parameters, context)

    return do_execute


def counting(begin: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Return `begin`, which a driver's connection is asked by for what begins a transaction, so that the connection
    counts: `celery_alchemy_begins`."""

    def count_and_begin(connection: Any) -> bytes:
        connection.celery_alchemy_begins += 1
        return begin(connection)

    return count_and_begin


def asks_the_cursor(execute: Any) -> bool:
    """Tell whether `execute`, a dialect's `do_execute`, asks the cursor, and does no more."""
    return getattr(execute, "__func__", None) is DefaultDialect.do_execute


def tell(executed: Executed, context: Any, statement: str, execute: Callable[..., None], *args: Any) -> None:
    """Call `execute`, and then `executed`."""
    try:
        execute(*args)
    except Exception:
        executed(context, statement, True)
        raise
    executed(context, statement, False)
