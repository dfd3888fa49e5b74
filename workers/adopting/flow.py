"""How a task leaves: with everything committed, or not."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from enum import IntEnum

import libcst as cst

from .source import block, called, dotted, is_name, own
from .uses import HARMLESS_AFTER_COMMIT, WRITES, IsSession

BUILTINS = {"str", "int", "float", "bool", "len", "list", "dict", "tuple", "set", "repr", "sorted", "sum", "min", "max"}
BUILTINS |= {"print", "round", "isinstance", "enumerate", "zip", "range", "any", "all", "format", "abs"}
LOGGERS = {"logger", "logging", "log", "_logger", "LOG", "LOGGER", "task_logger", "time", "datetime"}
SENDS = ("delay", "apply_async", "send_task")


class State(IntEnum):
    """What the Session has done since its last COMMIT."""

    CLEAN = 0
    """Nothing that a COMMIT could still write."""
    READ = 1
    """It was used, and perhaps objects were changed elsewhere."""
    WRITTEN = 2
    """It has something to write."""


@dataclass
class Exits:
    """How a block of statements ends."""

    through: State | None
    """At its end; None: the end is not reached."""
    returned: list[State] = field(default_factory=list)
    left: list[State] = field(default_factory=list)
    """By `break` and `continue`."""

    def add(self, other: Exits) -> None:
        """Take over how an inner block is left early."""
        self.returned += other.returned
        self.left += other.left


class Flow:
    """Follows the statements of a task."""

    def __init__(
        self, is_session: IsSession, passed: Callable[[cst.Call], bool], loaded: Set[str] = frozenset()
    ) -> None:
        self._is_session, self._passed, self._loaded = is_session, passed, loaded
        self.at: dict[cst.CSTNode, State] = {}
        """What the Session has done when a statement begins."""

    def run(self, statements: list[cst.BaseStatement], state: State | None = State.CLEAN) -> Exits:
        """Return how a list of statements ends."""
        exits = Exits(state)
        for statement in statements:
            if exits.through is None:
                break
            self.at[statement] = max(exits.through, self.at.get(statement, State.CLEAN))
            inner = self._statement(statement, exits.through)
            exits.add(inner)
            exits.through = inner.through
        return exits

    def all_committed(self, statements: list[cst.BaseStatement]) -> bool:
        """Tell whether every way out leaves nothing that a COMMIT would write."""
        exits = self.run(statements)
        states = [*exits.returned, *([exits.through] if exits.through is not None else [])]
        return all(state is State.CLEAN for state in states)

    def _statement(self, statement: cst.BaseStatement, state: State) -> Exits:
        if isinstance(statement, cst.SimpleStatementLine):
            return self._line(statement, state)
        if isinstance(statement, cst.If):
            return self._branches(statement, self._after(statement.test, state))
        if isinstance(statement, cst.For | cst.While):
            return self._loop(statement, state)
        if isinstance(statement, cst.Try):
            return self._try(statement, state)
        if isinstance(statement, cst.With):
            for item in statement.items:
                state = self._after(item.item, state)
            return self.run(block(statement.body), state)
        returns = any(isinstance(one, cst.Return) for one in own(statement))
        leaves = any(isinstance(one, cst.Break | cst.Continue) for one in own(statement))
        if isinstance(statement, cst.FunctionDef | cst.ClassDef):
            return Exits(state)
        worst = State.WRITTEN  # `match` and `except*`: each branch may be the one that is taken
        return Exits(worst, [worst] if returns else [], [worst] if leaves else [])

    def _line(self, line: cst.SimpleStatementLine, state: State) -> Exits:
        exits = Exits(state)
        for small in line.body:
            state = self._after(small, state)
            exits.through = state
            if isinstance(small, cst.Return):
                return Exits(None, [state])
            if isinstance(small, cst.Raise) or (
                isinstance(small, cst.Expr) and called(small.value, "retry") is not None
            ):
                return Exits(None)
            if isinstance(small, cst.Break | cst.Continue):
                return Exits(None, left=[state])
        return exits

    def _branches(self, statement: cst.If, state: State) -> Exits:
        exits = self.run(block(statement.body), state)
        other: Exits = Exits(state)
        if isinstance(statement.orelse, cst.If):
            other = self._branches(statement.orelse, self._after(statement.orelse.test, state))
        elif statement.orelse is not None:
            other = self.run(block(statement.orelse.body), state)
        exits.add(other)
        exits.through = _join(exits.through, other.through)
        return exits

    def _loop(self, statement: cst.For | cst.While, state: State) -> Exits:
        head = statement.iter if isinstance(statement, cst.For) else statement.test
        state = self._after(head, state)
        exits = self.run(block(statement.body), state)
        for _ in range(2):
            again = max([state, *([exits.through] if exits.through is not None else []), *exits.left])
            exits = self.run(block(statement.body), again)
            exits.through = max([again, *([exits.through] if exits.through is not None else []), *exits.left])
        exits.left = []
        if statement.orelse is not None:
            last = self.run(block(statement.orelse.body), exits.through)
            exits.add(last)
            exits.through = _join(exits.through, last.through)
        return exits

    def _try(self, statement: cst.Try, state: State) -> Exits:
        exits = self.run(block(statement.body), state)
        worst = max([state, *(self._after(one, state) for one in own(statement.body) if isinstance(one, cst.Call))])
        worst = max([worst, *(self.at.get(one, State.CLEAN) for one in own(statement.body))])
        if statement.orelse is not None and exits.through is not None:
            last = self.run(block(statement.orelse.body), exits.through)
            exits.add(last)
            exits.through = last.through
        for handler in statement.handlers:
            caught = self.run(block(handler.body), worst)
            exits.add(caught)
            exits.through = _join(exits.through, caught.through)
        if statement.finalbody is not None:
            ends = self.run(block(statement.finalbody.body), exits.through if exits.through is not None else worst)
            exits.through = ends.through if exits.through is not None else None
            exits.returned = [*exits.returned, *ends.returned]
        return exits

    def _after(self, node: cst.CSTNode, state: State) -> State:
        """Return the state after everything in `node` has been executed, in the order of the text."""
        alone = node.value if isinstance(node, cst.Expr) else None
        for one in [node, *own(node)]:
            if isinstance(one, cst.Call):
                state = self._call(one, state, certain=one is alone)
            elif isinstance(one, cst.AssignTarget | cst.AugAssign | cst.AnnAssign | cst.Del):
                if isinstance(one.target, cst.Attribute | cst.Subscript):
                    state = (
                        State.WRITTEN if state is not State.CLEAN or isinstance(one.target, cst.Attribute) else state
                    )
            elif self._is_session(one) and state is State.CLEAN and not self._ends(one, node):
                state = State.READ
        return state

    def _ends(self, use: cst.CSTNode, within: cst.CSTNode) -> bool:
        """Tell whether a use of the Session is `db.commit()` or another call that leaves nothing to write."""
        names = ("commit", "close", "remove", *HARMLESS_AFTER_COMMIT)
        return any(called(one, *names) is use for one in [within, *own(within)])

    def _call(self, call: cst.Call, state: State, *, certain: bool) -> State:
        base = call.func.value if isinstance(call.func, cst.Attribute) else None
        if base is not None and self._is_session(base):
            assert isinstance(call.func, cst.Attribute)
            name = call.func.attr.value
            if name in {"commit", "rollback"}:
                return State.CLEAN if certain else state
            if name in {"close", "remove"} or (name in HARMLESS_AFTER_COMMIT and state is State.CLEAN):
                return state
            return State.WRITTEN if name in WRITES else max(state, State.READ)
        if self._passed(call):
            return State.WRITTEN
        if isinstance(call.func, cst.Attribute) and call.func.attr.value in {"update", "delete", "append", "remove"}:
            return State.WRITTEN if state is not State.CLEAN or self._is_loaded(call) else state
        given = any(isinstance(arg.value, cst.Name) for arg in call.args)
        if state is State.CLEAN and not is_plain(call) and (given or self._is_loaded(call)):
            return State.READ  # it may change an object of the Session
        return state

    def _is_loaded(self, call: cst.Call) -> bool:
        """Tell whether it is a method of an object that the Session has returned."""
        return (dotted(call.func) or "").partition(".")[0] in self._loaded


def is_plain(call: cst.Call) -> bool:
    """Tell whether a call is of a kind that changes no object: logging, builtins, sending a task."""
    if is_name(call.func, *BUILTINS):
        return True
    name = dotted(call.func) or ""
    root = name.partition(".")[0]
    return root in LOGGERS or called(call, *SENDS, "isoformat", "format", "join", "items", "strip") is not None


def _join(one: State | None, other: State | None) -> State | None:
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)
