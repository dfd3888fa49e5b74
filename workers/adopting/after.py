"""What happens after a statement."""

from __future__ import annotations

import libcst as cst

from .flow import SENDS, is_plain
from .sessions import Found
from .source import block, called, own


def following(found: Found, statement: cst.CSTNode) -> list[cst.BaseStatement]:
    """Return the statements that may be executed after `statement`, until the task returns."""
    after: list[cst.BaseStatement] = []
    node = statement
    while node is not found.task.node:
        above = found.parents[node]
        siblings: list[cst.CSTNode] = list(above.body) if isinstance(above, cst.IndentedBlock) else []
        if node in siblings:
            for one in siblings[siblings.index(node) + 1 :]:
                assert isinstance(one, cst.BaseStatement)
                after.append(one)
                if isinstance(one, cst.SimpleStatementLine) and isinstance(one.body[-1], cst.Return | cst.Raise):
                    return after
        if isinstance(above, cst.Try) and node is above.body:
            after += block(above.orelse.body) if above.orelse else []
        if isinstance(above, cst.Try) and node is not above.finalbody and above.finalbody is not None:
            after += block(above.finalbody.body)
        if isinstance(above, cst.For | cst.While):
            after += block(above.body)
        node = above
    return after


def is_harmless(found: Found, statement: cst.CSTNode) -> bool:
    """Tell whether a statement neither takes time nor has anything to do with the Session."""
    if statement in found.closers or statement in found.dropped:
        return True
    for node in [statement, *own(statement)]:
        if node in found.nodes and node not in found.known:
            return False
        if isinstance(node, cst.Call) and not is_plain(node):
            return False
        if found.ends_with_commit and called(node, *SENDS) is not None:
            return False  # what is sent there comes after the COMMIT
        if isinstance(node, cst.For | cst.While | cst.With | cst.Try | cst.FunctionDef):
            return False
    return True
