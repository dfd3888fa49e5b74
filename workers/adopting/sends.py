"""Tasks that are sent between a write and its COMMIT."""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from .flow import SENDS, Flow, State
from .makers import Makers, assigned
from .sessions import Found
from .source import Ref, called, expression, is_name, local_imports, own

SIGNATURES = ("chain", "group", "chord", "s", "si", "signature", "subtask", "chunks", "map", "starmap", "set")
WAITS = ("get", "wait", "ready", "successful", "status", "state", "result", "collect", "join")


@dataclass(frozen=True, eq=False, slots=True)
class Send:
    """A call that sends a task, to be made after the COMMIT."""

    call: cst.Call
    what: cst.BaseExpression
    """What it is called on: a task, a signature, the app."""
    ref: Ref | None
    """What that stands for, where it is a name of the project."""


def find_sends(found: Found, flow: Flow, makers: Makers) -> list[Send]:
    """Return the calls that send while something is written and not committed, where a COMMIT follows."""
    local = local_imports(found.task.node, found.task.module)
    sends = []
    for line in own(found.task.node):
        if not isinstance(line, cst.SimpleStatementLine) or flow.at.get(line, State.CLEAN) is not State.WRITTEN:
            continue
        for call in own(line):
            base = called(call, *SENDS)
            if base is None or not isinstance(call, cst.Call) or _is_waited_for(found, line):
                continue
            if not _is_celerys(found, base):
                continue
            if _block_commits(found, line) or _commit_follows(found, line):
                sends.append(Send(call, base, makers.resolve(found.task.module, base, local)))
    return sends


def _is_celerys(found: Found, base: cst.BaseExpression) -> bool:
    """Tell whether `base.delay()` sends a task: `base` is a name of a module, the task itself, or a signature."""
    made = {pair[0]: pair[1] for line in own(found.task.node) if (pair := assigned(line)) is not None}
    if isinstance(base, cst.Name) and base.value in made:
        base = made[base.value]
    elif isinstance(base, cst.Name | cst.Attribute):
        return True
    name = base.func if isinstance(base, cst.Call) else None
    last = name.attr if isinstance(name, cst.Attribute) else name
    return is_name(last, *SIGNATURES)


def on_commit(call: cst.Call, *, is_ours: bool, alchemy: str, what: cst.BaseExpression) -> cst.Call:
    """Return the call that sends after the COMMIT.

    Args:
        is_ours: It is a DatabaseTask, which has the method itself.
    """
    assert isinstance(call.func, cst.Attribute)
    name = call.func.attr.value
    if is_ours:
        return call.with_changes(func=call.func.with_changes(attr=cst.Name(f"{name}_on_commit")))
    method = "delay_on_commit" if name == "delay" else "apply_async_on_commit"
    func = cst.parse_expression(f"{alchemy}.{method}")
    first = [] if name == "send_task" else [cst.Arg(what)]
    return call.with_changes(func=func, args=[*first, *call.args])


def _is_waited_for(found: Found, line: cst.SimpleStatementLine) -> bool:
    """Tell whether the task waits for what it has sent."""
    pair = assigned(line)
    if pair is None:
        only = expression(line)
        return only is None or called(only, *WAITS) is not None
    return any(
        isinstance(node, cst.Attribute) and is_name(node.value, pair[0]) and node.attr.value in WAITS
        for node in own(found.task.node)
    )


def _block_commits(found: Found, line: cst.CSTNode) -> bool:
    """Tell whether the end of the block around a line, or of the task's class, commits."""
    if found.recipe is not None and found.recipe.commits:
        return True
    blocks = {*found.begins, *(one.node for one in found.opened if one.source.commits or one.begin is not None)}
    while line is not found.task.node and line not in blocks:
        line = found.parents[line]
    return line in blocks


def _commit_follows(found: Found, statement: cst.CSTNode) -> bool:
    """Tell whether a COMMIT follows on the way on: in the same block, or in one around it."""
    node = statement
    while node is not found.task.node:
        above = found.parents[node]
        siblings: list[cst.CSTNode] = list(above.body) if isinstance(above, cst.IndentedBlock) else []
        for later in siblings[siblings.index(node) + 1 :] if node in siblings else ():
            value = expression(later)
            if value is not None and called(value, "commit") in found.nodes:
                return True
            if isinstance(later, cst.SimpleStatementLine) and isinstance(later.body[-1], cst.Return | cst.Raise):
                return False
        node = above
    return False
