"""The recipe, a task class that keeps a Session on the task: which parts the Session needs, and what else it does."""

from __future__ import annotations

from dataclasses import dataclass, field

import libcst as cst

from .makers import Makers, Source
from .source import Module, block, called, code, dotted, expression, is_name, own, walk

ENDS = ("close", "remove", "rollback", "commit", "flush", "expunge_all", "expire_all")
HOOKS = {"__init__", "__call__", "before_start", "after_return", "on_success", "on_failure", "on_retry", "run"}


@dataclass(eq=False)
class Recipe:
    """A task class that keeps a Session."""

    module: Module
    node: cst.ClassDef
    source: Source
    providers: set[str]
    """Attributes of the task that are its Session."""
    getters: set[str]
    """Methods without arguments that return it."""
    attributes: set[str]
    """Attributes where it is kept."""
    left: dict[cst.BaseStatement, cst.BaseStatement | None] = field(default_factory=dict)
    """What is left of each member; None: nothing."""
    commits: bool = False
    """Its `after_return` commits."""

    @property
    def only_cleans(self) -> bool:
        """Whether it keeps no Session, and only removes a scoped_session's."""
        return not self.providers and not self.getters

    @property
    def is_pure(self) -> bool:
        """Whether nothing is left of the class without its Session."""
        return all(one is None or _says_nothing(one) for one in self.left.values())


def find_recipe(module: Module, node: cst.ClassDef, makers: Makers) -> Recipe | str | None:
    """Return the recipe that a class is; None where it keeps no Session; text where it does, and in an unknown way."""
    reader = _Reader(module, node, makers)
    if reader.source is None:
        return "which keeps a Session in a way that is not understood" if reader.suspicious else None
    recipe = Recipe(module, node, reader.source, reader.providers, reader.getters, reader.attributes)
    for statement in block(node.body):
        recipe.left[statement] = reader.without_session(statement)
    if any(reader.mentions(one) for one in recipe.left.values() if one is not None):
        return "which keeps a Session and uses it in a way that is not understood"
    for member, left in recipe.left.items():
        if (
            isinstance(left, cst.FunctionDef)
            and left.name.value in HOOKS - {"run"}
            and not reader.commits_itself(member)
        ):
            return f"whose {left.name.value}() writes with its Session, and does not commit"
    recipe.commits = reader.commits
    return recipe


class _Reader:
    """Reads one class."""

    def __init__(self, module: Module, node: cst.ClassDef, makers: Makers) -> None:
        self.module, self.makers = module, makers
        self.source: Source | None = None
        self.attributes: set[str] = set()
        self.providers: set[str] = set()
        self.getters: set[str] = set()
        self.locals: set[str] = set()
        self.commits = self.suspicious = False
        methods = [one for one in block(node.body) if isinstance(one, cst.FunctionDef) and one.name.value != "run"]
        for method in methods:
            self._find_attributes(method)
        for method in methods:
            self._find_provider(method)
        for inner in (inner for one in methods for inner in own(one)) if self.source is None else ():
            self.source = self.source or self._scoped(called(inner, *ENDS))
        self.suspicious = self.source is None and any(
            called(inner, "close", "commit", "rollback") is not None for one in methods for inner in own(one)
        )
        if not self.providers and not self.getters:
            self.providers |= self.attributes

    # -- what holds the Session ----------------------------------------------------------------------------------------

    def _find_attributes(self, method: cst.FunctionDef) -> None:
        for node in own(method):
            if isinstance(node, cst.Assign) and (source := self._source_of(node.value)) is not None:
                for target in node.targets:
                    if (name := self._self_attribute(target.target)) is not None:
                        self.attributes.add(name)
                        self.source = self.source or source

    def _find_provider(self, method: cst.FunctionDef) -> None:
        returned = [node.value for node in own(method) if isinstance(node, cst.Return)]
        if not returned or method.name.value in HOOKS:
            return
        for value in returned:
            source = self._source_of(value) or self._scoped(value)
            if source is None and self._self_attribute(value) not in self.attributes:
                return
            self.source = self.source or source
        is_property = any(is_name(one.decorator, "property", "cached_property") for one in method.decorators)
        (self.providers if is_property else self.getters).add(method.name.value)

    def _source_of(self, node: cst.CSTNode | None) -> Source | None:
        source = self.makers.of_call(self.module, node)
        return source if source is None or not source.is_block else None

    def _scoped(self, node: cst.CSTNode | None) -> Source | None:
        source = self.makers.of_maker(self.module, node) if isinstance(node, cst.Name | cst.Attribute) else None
        return source if source is not None and source.scoped else None

    def _self_attribute(self, node: cst.CSTNode | None) -> str | None:
        """Return `x` of `self.x`, `self.x[...]`, `self.x.get(...)` and `self.x.pop(...)`."""
        if isinstance(node, cst.Subscript):
            node = node.value
        elif node is not None and (base := called(node, "get", "pop")) is not None:
            node = base
        return node.attr.value if isinstance(node, cst.Attribute) and is_name(node.value, "self") else None

    def holds(self, node: cst.CSTNode | None) -> bool:
        """Tell whether an expression is the Session, or what keeps it."""
        if self._self_attribute(node) in self.attributes | self.providers or is_name(node, *self.locals):
            return True
        if self._scoped(node) is not None or self._source_of(node) is not None:
            return True
        getter = called(node, *self.getters) if node is not None and self.getters else None
        return is_name(getter, "self")

    def mentions(self, node: cst.CSTNode) -> bool:
        """Tell whether something that stays has to do with what goes."""
        names = self.attributes - self.providers
        return any(
            (isinstance(one, cst.Attribute) and is_name(one.value, "self") and one.attr.value in names)
            or is_name(one, *self.locals)
            or self._source_of(one) is not None
            for one in walk(node)
        )

    def commits_itself(self, hook: cst.CSTNode) -> bool:
        """Tell whether a method that uses the Session commits; one that does not use it is as good."""
        writes = (called(node, "add", "add_all", "delete", "execute", "merge", "query") for node in own(hook))
        if not any(base is not None and self.holds(base) for base in writes):
            return True
        return any(base is not None and self.holds(base) for base in (called(node, "commit") for node in own(hook)))

    # -- what goes -----------------------------------------------------------------------------------------------------

    def without_session(self, statement: cst.BaseStatement) -> cst.BaseStatement | None:
        """Return what is left of a member of the class; None: nothing."""
        if isinstance(statement, cst.SimpleStatementLine):
            only = statement.body[0]
            target = getattr(only, "target", None) or (only.targets[0].target if isinstance(only, cst.Assign) else None)
            is_state = is_name(target, *self.attributes) if target is not None else False
            return None if is_state and len(statement.body) == 1 else statement
        if not isinstance(statement, cst.FunctionDef):
            return statement
        name = statement.name.value
        if name == "run":
            return statement
        if name in self.providers | self.getters:
            return None
        touched = any(self.holds(node) for node in own(statement))
        if not touched:
            return statement
        self.locals = {
            target.target.value
            for node in own(statement)
            if isinstance(node, cst.Assign) and self.holds(node.value)
            for target in node.targets
            if isinstance(target.target, cst.Name)
        }
        left = [one for one in block(statement.body) if not self._goes(one, name)]
        if all(_is_super(one, name) or _says_nothing(one) for one in left):
            return None
        return statement.with_deep_changes(statement.body, body=left)

    def _goes(self, statement: cst.CSTNode, hook: str) -> bool:
        """Tell whether a statement is about the Session and nothing else."""
        if isinstance(statement, cst.If):
            parts: list[cst.CSTNode] = [*block(statement.body), *([statement.orelse] if statement.orelse else [])]
            return all(self._goes(one, hook) for one in parts) and not _calls(statement.test)
        if isinstance(statement, cst.Else | cst.Finally | cst.ExceptHandler):
            return all(self._goes(one, hook) or _says_nothing(one) for one in block(statement.body))
        if isinstance(statement, cst.Try):
            parts = [
                *block(statement.body),
                *statement.handlers,
                *filter(None, (statement.orelse, statement.finalbody)),
            ]
            return all(self._goes(one, hook) or _is_super(one, hook) for one in parts)
        if not isinstance(statement, cst.SimpleStatementLine):
            return False
        return all(self._small_goes(one, hook) for one in statement.body)

    def _small_goes(self, small: cst.BaseSmallStatement, hook: str) -> bool:
        if isinstance(small, cst.Expr):
            base = called(small.value, *ENDS)
            if base is not None and self.holds(base):
                self.commits |= called(small.value, "commit") is not None
                return True
            return False
        if isinstance(small, cst.Assign):
            targets = [target.target for target in small.targets]
            ours = all(self.holds(target) or self._self_attribute(target) in self.attributes for target in targets)
            empty = code(small.value) in {"None", "{}", "dict()"} or self.holds(small.value)
            return ours and empty
        if isinstance(small, cst.Del):
            return self.holds(small.target)
        return isinstance(small, cst.Raise) and small.exc is None


def _is_super(statement: cst.CSTNode, hook: str) -> bool:
    """Tell whether a statement does what the method of the base class does."""
    value: cst.CSTNode | None = expression(statement)
    if isinstance(statement, cst.SimpleStatementLine) and isinstance(statement.body[0], cst.Return):
        value = statement.body[0].value
    if not isinstance(value, cst.Call):
        return False
    if hook == "__call__" and dotted(value.func) == "self.run":
        return True
    base = called(value, hook)
    return isinstance(base, cst.Call) and is_name(base.func, "super")


def _says_nothing(statement: cst.CSTNode) -> bool:
    if not isinstance(statement, cst.SimpleStatementLine):
        return False
    only = statement.body[0]
    if isinstance(only, cst.Pass) or (isinstance(only, cst.Expr) and isinstance(only.value, cst.SimpleString)):
        return True
    return isinstance(only, cst.Assign) and code(only) == "abstract = True"


def _calls(node: cst.CSTNode) -> bool:
    return any(isinstance(one, cst.Call) for one in walk(node))
