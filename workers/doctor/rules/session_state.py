"""Tasks that leave something on the server's side of their connection, which the next task then has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from ..reading.state import Event
from ..reading.values import literal
from .facts import Facts

_START = r"(?:^|;)\s*"
#: What stays as long as the connection, in texts of SQL: what to call it, how it looks, and what undoes it in the same
#: task.
_STAYS = tuple(
    (name, re.compile(look, re.I | re.S), re.compile(undone, re.I) if undone else None)
    for name, look, undone in (
        ("SET ROLE", _START + r"SET\s+(?:SESSION\s+)?(?:ROLE|SESSION\s+AUTHORIZATION|AUTHORIZATION)\b", r"RESET\s+"),
        ("SET without LOCAL",
         _START + r"SET\s+(?!(?:LOCAL|TRANSACTION|CONSTRAINTS|GLOBAL|STATEMENT)\b)[\w@`\"]", r"RESET\s+"),
        ("set_config(..., false)", r"\bset_config\s*\([^()]*,\s*(?:false|'f(?:alse)?')\s*\)", ""),
        ("a temporary table", r"\b(?:CREATE\s+(?:OR\s+REPLACE\s+)?(?:(?:LOCAL|GLOBAL)\s+)?|INTO\s+)TEMP(?:ORARY)?\b",
         r"ON\s+COMMIT\s+DROP|DROP\s+(?:TEMPORARY\s+)?TABLE"),
        ("a lock of the session", r"\bpg_(?:try_)?advisory_lock(?:_shared)?\b", r"\bpg_advisory_unlock"),
        ("GET_LOCK", r"\bGET_LOCK\s*\(", r"\bRELEASE_(?:ALL_)?LOCKS?\b"),
        ("LOCK TABLES", _START + r"LOCK\s+TABLES\b", r"\bUNLOCK\s+TABLES\b"),
        ("LISTEN", _START + r"LISTEN\b", r"\bUNLISTEN\b"),
        ("PREPARE", _START + r"PREPARE\s+(?!TRANSACTION\b)", r"\bDEALLOCATE\b"),
        ("a cursor WITH HOLD", r"\bCURSOR\s+WITH\s+HOLD\b", _START + r"CLOSE\b"),
        ("USE", _START + r"USE\s+[\w`]+\s*;?\s*$", ""),
    )
)  # fmt: skip


def on_statement(event: Event, facts: Facts) -> None:
    """A Session executes something."""
    if event.entry.kind != "task" or facts.settings.get("alchemy_reset_on_return") is True:
        return
    texts = [
        text for value in event.info["args"] for text in (literal(value), *map(literal, value.parts.get("args", ())))
    ]
    said = facts.texts.setdefault(event.entry.node, [])
    for text in (*(one for one in texts if isinstance(one, str)), *_called(event.node)):
        said.append(text)
        for name, look, undone in _STAYS:
            if look.search(text):
                facts.add(
                    "session-state",
                    event,
                    holds=lambda undone=undone: not (undone and any(undone.search(one) for one in said)),  # type: ignore[misc]
                    name=event.entry.name,
                    what=name,
                )
                break


def _called(node: ast.AST) -> Iterator[str]:
    """Yield the functions of the database that a statement calls: `func.pg_advisory_lock(1)`."""
    for call in ast.walk(node):
        function = call.func if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else None
        if isinstance(call, ast.Call) and function is not None and getattr(function.value, "id", "") == "func":
            yield f"{function.attr}({', '.join(ast.unparse(one) for one in call.args)})"
