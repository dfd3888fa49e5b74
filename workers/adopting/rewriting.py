"""Changing syntax trees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import libcst as cst

from .source import block, called, is_name

Change = Callable[[Any], Any]
"""Takes a node whose inside is changed already; returns what stands in its place."""


class Edits:
    """Changes of one function, class or module, collected first and applied together."""

    def __init__(self) -> None:
        self._changes: dict[cst.CSTNode, list[Change]] = {}

    def add(self, node: cst.CSTNode, change: Change) -> None:
        """Let `change` be made of `node`, after those that were added before."""
        self._changes.setdefault(node, []).append(change)

    def take(self, other: Edits) -> None:
        """Add the changes of `other`."""
        for node, changes in other._changes.items():
            self._changes.setdefault(node, []).extend(changes)

    def remove(self, node: cst.CSTNode) -> None:
        """Take a statement out."""
        self.add(node, lambda _: cst.RemoveFromParent())

    def apply(self, node: cst.CSTNode) -> Any:
        """Return `node` with all changes made."""
        return node.visit(_Apply(self._changes))


class _Apply(cst.CSTTransformer):
    def __init__(self, changes: dict[cst.CSTNode, list[Change]]) -> None:
        super().__init__()
        self._changes = changes

    def on_leave(self, original_node: Any, updated_node: Any) -> Any:
        result = super().on_leave(original_node, updated_node)
        for change in self._changes.get(original_node, ()):
            if isinstance(result, cst.CSTNode):
                result = change(result)
        if isinstance(result, cst.If) and not block(result.body):
            return _without_empty(result)
        return result


def _without_empty(statement: cst.If) -> Any:
    """An `if` from which everything has been taken goes itself; one with an `else` keeps a `pass`."""
    return cst.RemoveFromParent() if statement.orelse is None else statement


def flat(statement: Any, body: Sequence[cst.BaseStatement]) -> Any:
    """Return `body` to stand where `statement` stood, with its comments."""
    if not body:
        return cst.RemoveFromParent()
    first = body[0].with_changes(leading_lines=[*statement.leading_lines, *getattr(body[0], "leading_lines", ())])
    return cst.FlattenSentinel([first, *body[1:]])


def without_item(index: int) -> Change:
    """Take one item out of a `with`; its last one takes the `with` along."""

    def change(statement: cst.With) -> Any:
        items = [item for number, item in enumerate(statement.items) if number != index]
        if not items:
            return flat(statement, block(statement.body))
        return statement.with_changes(items=[*items[:-1], items[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)])

    return change


def without_finally(statement: cst.Try) -> Any:
    """Take an empty `finally` away; and the `try`, where nothing is caught."""
    if statement.finalbody is not None and block(statement.finalbody.body):
        return statement
    if not statement.handlers:
        rest = block(statement.orelse.body) if statement.orelse is not None else []
        return flat(statement, [*block(statement.body), *rest])
    return statement.with_changes(finalbody=None)


def unit_block(name: str | None, alchemy: str, commits: bool, body: Sequence[cst.BaseStatement]) -> cst.With:
    """Return `with alchemy.unit_of_work() as name:` around `body`."""
    return cst.With([unit_item(name, alchemy, commits)], cst.IndentedBlock(body))


def unit_item(name: str | None, alchemy: str, commits: bool) -> cst.WithItem:
    """Return `alchemy.unit_of_work() as name`."""
    call = cst.parse_expression(f"{alchemy}.unit_of_work({'' if commits else 'commit=False'})")
    return cst.WithItem(call, cst.AsName(cst.Name(name)) if name is not None else None)


def with_parameter(name: str, annotation: str) -> Change:
    """Add a parameter to a function: the last of those without default, or one that is passed by name only."""
    parameter = cst.Param(cst.Name(name), cst.Annotation(cst.parse_expression(annotation)))

    def change(function: cst.FunctionDef) -> cst.FunctionDef:
        parameters = function.params
        simple = isinstance(parameters.star_arg, cst.MaybeSentinel) and not parameters.kwonly_params
        if simple and parameters.star_kwarg is None and all(one.default is None for one in parameters.params):
            named = [*(one.with_changes(comma=_comma(one)) for one in parameters.params), parameter]
            return function.with_changes(params=parameters.with_changes(params=named))
        named = [*(one.with_changes(comma=_comma(one)) for one in parameters.kwonly_params)]
        only = [parameter, *named] if not named else [*named, parameter]
        star = cst.ParamStar() if isinstance(parameters.star_arg, cst.MaybeSentinel) else parameters.star_arg
        before = [one.with_changes(comma=_comma(one)) for one in parameters.params]
        changed = parameters.with_changes(params=before, star_arg=star, kwonly_params=only)
        return function.with_changes(params=changed)

    return change


def with_options(options: dict[str, str]) -> Change:
    """Set keyword arguments of a task's decorator."""

    def change(decorator: cst.Decorator) -> cst.Decorator:
        call = decorator.decorator
        call = call if isinstance(call, cst.Call) else cst.Call(call)
        args = list(call.args)
        for name, value in options.items():
            new = keyword(name, value)
            at = next((i for i, arg in enumerate(args) if arg.keyword is not None and arg.keyword.value == name), None)
            if at is not None:
                args[at] = args[at].with_changes(value=new.value)
                continue
            if args and isinstance(args[-1].comma, cst.MaybeSentinel):
                args[-1] = args[-1].with_changes(comma=cst.Comma(whitespace_after=cst.SimpleWhitespace(" ")))
            args.append(new)
        return decorator.with_changes(decorator=call.with_changes(args=args))

    return change


def keyword(name: str, value: str) -> cst.Arg:
    """Return `name=value` as an argument."""
    tight = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
    return cst.Arg(cst.parse_expression(value), keyword=cst.Name(name), equal=tight)


def with_base(index: int, new: str) -> Change:
    """Let a class derive from `new`, in the place of one of its base classes."""

    def change(cls: cst.ClassDef) -> cst.ClassDef:
        bases = list(cls.bases)
        bases[index] = bases[index].with_changes(value=cst.parse_expression(new))
        return cls.with_changes(bases=bases)

    return change


def statement(text: str) -> cst.BaseStatement:
    """Return the statement that `text` is."""
    return cst.parse_statement(text)


class Rename(cst.CSTTransformer):
    """Spells `self.session` and `self.get_session()` as `self.db`."""

    def __init__(self, this: Iterable[str], names: set[str], getters: set[str]) -> None:
        super().__init__()
        self._this, self._names, self._getters = set(this), names, getters

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        """Rename an attribute of the task."""
        if is_name(original_node.value, *self._this) and original_node.attr.value in self._names:
            return updated_node.with_changes(attr=cst.Name("db"))
        return updated_node

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        """Let an attribute stand where a method was called."""
        base = called(original_node, *self._getters) if self._getters and not original_node.args else None
        if base is None or not is_name(base, *self._this):
            return updated_node
        assert isinstance(updated_node.func, cst.Attribute)
        return updated_node.func.with_changes(attr=cst.Name("db"))


def _comma(parameter: cst.Param) -> cst.Comma:
    if isinstance(parameter.comma, cst.Comma):
        return parameter.comma
    return cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
