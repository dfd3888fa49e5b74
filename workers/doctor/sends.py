"""Tasks that send another one before what they have written is committed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from celery import Celery

from ..extension import Alchemy
from ..task import DatabaseTask
from ..wrapping import injected_places
from .code import Module, calls, function_node, tasks_of, value_of
from .findings import Finding, warning

_WRITES = ("add", "add_all", "delete", "merge", "bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings")
_STATEMENTS = ("insert", "update", "delete")
_SENDS = ("delay", "apply_async", "send_task")


def look_for_sends(app: Celery, alchemies: list[Alchemy], modules: dict[str, Module]) -> Iterator[Finding]:
    """Yield a finding for each task whose code writes and then sends, with no COMMIT between, line by line."""
    if any(db.settings.enqueue_on_commit for db in alchemies):
        return
    for task in tasks_of(app).values():
        found = function_node(modules, task.run) if isinstance(task, DatabaseTask) else None
        if found is None or task.read_only or not alchemies:
            continue
        module, node = found
        send = _first_send_before_commit(module, node, {place.name for place in injected_places(type(task).run)})
        if send is not None:
            yield warning(
                "sends-before-commit",
                f"{task.name} writes, and sends a task before that is committed: the other one may run before it can "
                f"see the row, or for a row that is rolled back.",
                "Use delay_on_commit(...) or apply_async_on_commit(...), or set alchemy_enqueue_on_commit = True.",
                module.where(send),
            )


def _first_send_before_commit(module: Module, node: ast.FunctionDef, injected: set[str]) -> ast.Call | None:
    later = {id(one) for inner in _inner_functions(node) for one in ast.walk(inner)}
    blocks = [one for one in ast.walk(node) if isinstance(one, ast.With) and _is_unit_of_work(one)]
    sessions = {"self.db", "db.session"} | injected
    sessions |= {
        item.optional_vars.id for one in blocks for item in one.items if isinstance(item.optional_vars, ast.Name)
    }
    writes = [call.lineno for call in ast.walk(node) if isinstance(call, ast.Call) and _writes(call, sessions)]
    # A block commits at its end what was written in it, and nothing of what was written before it.
    ends = {line: one.end_lineno or line for one in blocks for line in range(one.lineno, (one.end_lineno or 0) + 1)}
    commits = [call.lineno for call in calls(node, "commit")]
    for send in calls(node, *_SENDS):
        if id(send) in later or _says_when(module, send):
            continue
        pending = [
            line
            for line in writes
            if line < send.lineno
            and not (line in ends and ends[line] < send.lineno)
            and not any(line < commit < send.lineno for commit in commits)
        ]
        if pending:
            return send
    return None


def _inner_functions(node: ast.FunctionDef) -> Iterator[ast.AST]:
    for one in ast.walk(node):
        if one is not node and isinstance(one, ast.Lambda | ast.FunctionDef):
            yield one


def _is_unit_of_work(block: ast.With) -> bool:
    return any(calls(item.context_expr, "unit_of_work") for item in block.items)


def _writes(call: ast.Call, sessions: set[str]) -> bool:
    if not isinstance(call.func, ast.Attribute) or ast.unparse(call.func.value) not in sessions:
        return False
    if call.func.attr in _WRITES:
        return True
    if call.func.attr not in {"execute", "scalar", "scalars"} or not call.args:
        return False
    text = ast.unparse(call.args[0]).lower()
    return any(
        text.startswith((f"{word}(", f"text('{word} ", f'text("{word} ')) or f".{word}(" in text for word in _STATEMENTS
    )


def _says_when(module: Module, send: ast.Call) -> bool:
    """Tell whether what is sent waits for the commit, or says that it does not want to."""
    if any(keyword.arg == "enqueue_on_commit" for keyword in send.keywords):
        return True
    receiver: Any = value_of(module, send.func.value) if isinstance(send.func, ast.Attribute) else None
    return getattr(receiver, "enqueue_on_commit", None) is not None
