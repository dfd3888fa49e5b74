"""What expressions stand for."""

from __future__ import annotations

import ast
from abc import abstractmethod
from typing import Any

from .names import NONE, Names
from .state import State
from .values import UNKNOWN, Value, constant, literal

#: Never None, and true.
_OBJECTS = {"session", "scoped", "engine", "async_engine", "maker", "instance", "flask_db", "alchemy", "celery", "task"}


class Expressions(Names):
    """The evaluation of expressions, calls apart."""

    quiet: int

    @abstractmethod
    def call(self, node: ast.Call, state: State) -> Value:
        """Go through a call, and return what it returns."""

    @abstractmethod
    def assign(self, target: ast.expr, value: Value, state: State, node: ast.AST) -> None:
        """Let a target stand for a value."""

    @abstractmethod
    def yielded(self, value: Value, state: State, node: ast.AST) -> Value:
        """Go on where a generator's caller does."""

    def evaluate(self, node: ast.expr | None, state: State) -> Value:
        """Return what an expression stands for, and let `state` have what happens in it."""
        if node is None:
            return NONE
        of_type: Any = getattr(self, f"_in_{type(node).__name__.lower()}", None)
        if of_type is not None:
            found: Value = of_type(node, state)
            return found
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.evaluate(child, state)
        return UNKNOWN

    def _in_constant(self, node: ast.Constant, state: State) -> Value:
        return constant(node.value, node)

    def _in_joinedstr(self, node: ast.JoinedStr, state: State) -> Value:
        parts = []
        for one in node.values:
            if isinstance(one, ast.FormattedValue):
                self.evaluate(one.value, state)
            parts.append(str(one.value) if isinstance(one, ast.Constant) else "x")
        return constant("".join(parts), node)

    def _in_name(self, node: ast.Name, state: State) -> Value:
        return self.lookup(node.id, state)

    def _in_attribute(self, node: ast.Attribute, state: State) -> Value:
        return self.attribute(self.evaluate(node.value, state), node.attr, state, node)

    def _in_call(self, node: ast.Call, state: State) -> Value:
        return self.call(node, state)

    def _in_await(self, node: ast.Await, state: State) -> Value:
        return self.evaluate(node.value, state)

    def _in_starred(self, node: ast.Starred, state: State) -> Value:
        return self.evaluate(node.value, state)

    def _in_namedexpr(self, node: ast.NamedExpr, state: State) -> Value:
        value = self.evaluate(node.value, state)
        self.assign(node.target, value, state, node)
        return value

    def _in_lambda(self, node: ast.Lambda, state: State) -> Value:
        return Value(
            "function",
            "lambda",
            node,
            self.frame.module,
            {"outer": (state.env, *state.outer) if self.frame.function else (), "flags": set()},
        )

    def _in_ifexp(self, node: ast.IfExp, state: State) -> Value:
        known = self.truth(node.test, state)
        self.evaluate(node.test, state)
        if known is not None:
            return self.evaluate(node.body if known else node.orelse, state)
        body, orelse = self.evaluate(node.body, state), self.evaluate(node.orelse, state)
        return orelse if body.kind == "constant" or body.name == "?" else body

    def _in_compare(self, node: ast.Compare, state: State) -> Value:
        for one in (node.left, *node.comparators):
            self.evaluate(one, state)
        known = self.truth(node, state)
        return UNKNOWN if known is None else constant(known, node)

    def _in_boolop(self, node: ast.BoolOp, state: State) -> Value:
        found = [self.evaluate(one, state) for one in node.values]
        telling = [one for one in found if one.kind != "constant" and one.name != "?"]
        return telling[0] if telling and isinstance(node.op, ast.Or) else telling[-1] if telling else UNKNOWN

    def _in_list(self, node: ast.List | ast.Tuple | ast.Set, state: State) -> Value:
        return Value("list", node=node, parts={"items": [self.evaluate(one, state) for one in node.elts]})

    _in_tuple = _in_set = _in_list

    def _in_dict(self, node: ast.Dict, state: State) -> Value:
        keys = [literal(self.evaluate(key, state)) if key is not None else None for key in node.keys]
        items = [self.evaluate(value, state) for value in node.values]
        return Value("list", "dict", node, parts={"items": items, "keys": keys})

    def _in_subscript(self, node: ast.Subscript, state: State) -> Value:
        value = self.evaluate(node.value, state)
        if value.kind == "external" and value.last in {"Annotated", "Optional"}:
            return Value("typed", node=node, parts={"value": self.depends(node, state) or self.annotated(node, state)})
        self.evaluate(node.slice, state)
        if value.kind == "list" and value.name == "dict" and isinstance(node.slice, ast.Constant):
            known: dict[Any, Value] = dict(zip(value.parts["keys"], value.parts["items"], strict=True))
            return known.get(node.slice.value, UNKNOWN)
        if value.kind in {"entities", "list"} and not isinstance(node.slice, ast.Slice):
            return self.item_of(value)
        return value if value.kind in {"entities", "list"} else UNKNOWN

    def depends(self, node: ast.expr | None, state: State) -> Value | None:
        """Return what a dependency of FastAPI's, `Depends(get_db)`, gives."""
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
            return next((found for one in node.slice.elts if (found := self.depends(one, state)) is not None), None)
        if not isinstance(node, ast.Call) or not node.args:
            return None
        if self.evaluate(node.func, state).last != "Depends":
            return None
        function = self.evaluate(node.args[0], state)
        return self.what_it_gives(function)

    def what_it_gives(self, function: Value) -> Value | None:
        """Return what a function of the project returns or yields."""
        if function.kind != "function" or function.node in self.asked:
            return None
        assert function.module is not None
        given: list[Value] = []
        self.asked.add(function.node)
        try:
            with self.silently(function.module) as state:
                if function.parts["flags"] & {"generator", "context"}:
                    self.run_generator(
                        function, [], {}, state, node=function.node, then=lambda _, value: given.append(value)
                    )
                else:
                    given.append(self.inline(function, [], {}, state, function.node or ast.Pass()))
        finally:
            self.asked.discard(function.node)
        return next((one for one in given if one.name != "?"), None)

    @abstractmethod
    def run_generator(
        self, function: Value, args: list[Value], keywords: dict[str, Value], state: State, *, node: Any, then: Any
    ) -> None:
        """Go through a generator, and at each `yield` through `then(its state, what it yields)`."""

    def _in_generatorexp(self, node: Any, state: State) -> Value:
        inner = State(dict(state.env), state.outer, state.sessions)
        for one in node.generators:
            self.assign(one.target, self.item_of(self.evaluate(one.iter, inner)), inner, node)
            for test in one.ifs:
                self.evaluate(test, inner)
        if isinstance(node, ast.DictComp):
            self.evaluate(node.key, inner)
        element = self.evaluate(node.value if isinstance(node, ast.DictComp) else node.elt, inner)
        state.dead = state.dead or inner.dead
        return Value("list", "many", node, parts={"items": [element]})

    _in_listcomp = _in_setcomp = _in_dictcomp = _in_generatorexp

    def _in_yield(self, node: ast.Yield, state: State) -> Value:
        return self.yielded(self.evaluate(node.value, state), state, node)

    def _in_yieldfrom(self, node: ast.YieldFrom, state: State) -> Value:
        return self.yielded(self.evaluate(node.value, state), state, node)

    def item_of(self, value: Value) -> Value:
        """Return what a loop over a value gets."""
        if value.kind in {"entities", "query"} and value.parts.get("cls") is not None:
            return Value("entity", node=value.node, parts=value.parts)
        if value.kind == "list" and value.parts["items"]:
            first: Value = value.parts["items"][0]
            return first
        return UNKNOWN

    def truth(self, test: ast.expr, state: State) -> bool | None:
        """Return whether a condition holds; None where that is not known."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            known = self.truth(test.operand, state)
            return None if known is None else not known
        if isinstance(test, ast.BoolOp):
            parts = [self.truth(one, state) for one in test.values]
            decides = isinstance(test.op, ast.Or)
            return decides if decides in parts else None if None in parts else not decides
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            return self._compared(test, state)
        if not isinstance(test, ast.Name | ast.Attribute | ast.Constant):
            return None
        if isinstance(test, ast.Name) and test.id == "TYPE_CHECKING":
            return False
        self.quiet += 1
        value = self.evaluate(test, State(state.env, state.outer, dict(state.sessions)))
        self.quiet -= 1
        if value.parts.get("later"):
            return None
        if value.kind == "constant":
            return bool(literal(value))
        if value.kind == "method" and value.name == "is_active":
            return True
        return True if value.kind in _OBJECTS else None

    def _compared(self, test: ast.Compare, state: State) -> bool | None:
        left, right = test.left, test.comparators[0]
        if isinstance(left, ast.Name) and left.id == "__name__" and isinstance(test.ops[0], ast.Eq):
            return False
        if not isinstance(right, ast.Constant) or right.value is not None:
            return None
        self.quiet += 1
        value = self.evaluate(left, State(state.env, state.outer, dict(state.sessions)))
        self.quiet -= 1
        if value.parts.get("later"):
            return None
        is_none = True if value.kind == "constant" and literal(value) is None else None
        is_none = False if value.kind in _OBJECTS or (value.kind == "constant" and not is_none) else is_none
        if is_none is None or not isinstance(test.ops[0], ast.Is | ast.IsNot):
            return None
        return is_none if isinstance(test.ops[0], ast.Is) else not is_none
