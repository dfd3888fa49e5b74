"""`except` blocks that catch a database error."""

from __future__ import annotations

from collections.abc import Iterator

import libcst as cst

from .after import following
from .flow import Flow
from .makers import Makers
from .rewriting import Change, statement
from .sessions import Found
from .source import Module, RefusedError, block, called, code, dotted, local_imports, own, walk
from .uses import IsSession, Scope

AnyHandler = cst.ExceptHandler | cst.ExceptStarHandler
BROAD = {"Exception", "BaseException", "SoftTimeLimitExceeded"}
"""These may come in the middle of a statement."""
OF_DATABASES = ("sqlalchemy.", "psycopg.", "psycopg2.", "pymysql.", "MySQLdb.", "sqlite3.")


def to_roll_back(found: Found, makers: Makers) -> Iterator[tuple[str, cst.ExceptHandler]]:
    """Yield the handlers that need a `rollback()`, and the Session's spelling there.

    By hand, the `close()` after such a handler rolls back. Here a task that returns with a failed transaction fails.

    Raises:
        RefusedError: one catches a database error, does not roll back, and goes on.
    """
    for node in own(found.task.node):
        hides = isinstance(node, cst.With) and any(_suppresses(found, makers, item) for item in node.items)
        if hides and any(one in found.nodes for one in walk(node)):
            raise RefusedError("`suppress` may hide a database error, and nothing rolls back", node)
        if not isinstance(node, cst.Try):
            continue
        uses = [one for one in walk(node.body) if one in found.nodes and one not in found.known]
        uses = [one for one in uses if not _is_apart(found, one, node)]
        if not uses:
            continue
        for handler in node.handlers:
            kind = _kind(makers, found.task.module, found.task.node, handler)
            if kind is None or _ends_well(handler, found.is_session):
                continue
            if kind == "database" or _goes_on(found, node):
                what = f"except {code(handler.type)}" if handler.type is not None else "except"
                raise RefusedError(f"`{what}:` catches a database error, and does not roll back", handler)
            yield code(uses[0]), handler


def _suppresses(found: Found, makers: Makers, item: cst.WithItem) -> bool:
    func = item.item.func if isinstance(item.item, cst.Call) else None
    return (
        makers.outside(found.task.module, func, local_imports(found.task.node, found.task.module))
        == "contextlib.suppress"
    )


def refuse_swallowed(scope: Scope, makers: Makers) -> None:
    """Refuse a function that is given the Session, catches a database error, and does not roll back.

    Raises:
        RefusedError: it does.
    """
    for node in own(scope.function):
        if not isinstance(node, cst.Try) or not any(scope.is_session(one) for one in walk(node.body)):
            continue
        for handler in node.handlers:
            careful = _ends_well(handler, scope.is_session)
            if not careful and _kind(makers, scope.module, scope.function, handler) is not None:
                name = scope.function.name.value
                raise RefusedError(f"{name}(), which is given its Session, catches a database error without rollback")


def rolling_back(name: str) -> Change:
    """Begin a handler with a rollback."""

    def change(handler: cst.ExceptHandler) -> cst.ExceptHandler:
        return handler.with_changes(body=cst.IndentedBlock([statement(f"{name}.rollback()"), *block(handler.body)]))

    return change


def _is_apart(found: Found, use: cst.CSTNode, tried: cst.Try) -> bool:
    """Tell whether a use is in a savepoint, or in a Session of its own, that ends within the `try`."""
    opened = {one.node for one in found.opened}
    node = use
    while node is not tried:
        node = found.parents[node]
        if isinstance(node, cst.With):
            savepoint = any(called(item.item, "begin_nested") in found.nodes for item in node.items)
            if node in opened or (savepoint and use not in set(walk(node.items[0]))):
                return True
    return called(found.parents[found.parents[use]], "begin_nested") is use if use in found.parents else False


def _kind(makers: Makers, module: Module, function: cst.FunctionDef, handler: AnyHandler) -> str | None:
    """Return "broad" or "database" for a handler that catches database errors."""
    if handler.type is None:
        return "broad"
    local = local_imports(function, module)
    types = [one.value for one in handler.type.elements] if isinstance(handler.type, cst.Tuple) else [handler.type]
    names = [makers.outside(module, one, local) or dotted(one) or "" for one in types]
    if any(name.startswith(OF_DATABASES) for name in names):
        return "database"
    return "broad" if any(name.rpartition(".")[2] in BROAD for name in names) else None


def _ends_well(handler: AnyHandler, is_session: IsSession) -> bool:
    """Tell whether a handler rolls back, tries to commit, or always raises."""
    bases = (called(one, "rollback", "commit") for one in own(handler))
    if any(base is not None and is_session(base) for base in bases):
        return True
    exits = Flow(is_session, lambda _: False).run(block(handler.body))
    return exits.through is None and not exits.returned and not exits.left


def _goes_on(found: Found, tried: cst.Try) -> bool:
    """Tell whether the Session is used after the `try`, or the `try` is in a loop."""
    if found.is_in_loop(tried):
        return True
    later = [one for handled in following(found, tried) for one in walk(handled)]
    return any(one in found.nodes and one not in found.known for one in later)
