"""The source files of a project, and what the names in them stand for. Nothing is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path

import libcst as cst
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider

SKIPPED = {"node_modules", "site-packages", "__pycache__", "build", "dist", "venv", "env"}
"""Folders that hold no code of the project's own; neither do those that begin with a dot or hold a pyvenv.cfg."""

MARKERS = (".git", "pyproject.toml", "setup.py", "setup.cfg", "manage.py", "requirements.txt")
"""What stands in the folder of a whole project."""
ELSEWHERE = {
    "celery",
    "kombu",
    "sqlalchemy",
    "sqlmodel",
    "flask_sqlalchemy",
    "celery_alchemy",
    "contextlib",
    "threading",
}
"""Packages that a file of the project may be called after (`shop/celery.py`), and is not."""

LAYOUT = (
    *("whitespace", "leading_", "lines_", "trailing_", "header", "footer", "comma", "semicolon", "equal", "dot"),
    *("lpar", "rpar", "lbracket", "rbracket", "asynchronous"),
)
"""How the names of fields begin that hold spaces, comments and brackets."""


class RefusedError(Exception):
    """A task is not understood: where, and why."""

    def __init__(self, reason: str, node: cst.CSTNode | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


@dataclass(frozen=True, slots=True)
class Imported:
    """A name that an import statement binds."""

    target: str
    """The full dotted name it stands for."""


Bound = Imported | cst.FunctionDef | cst.ClassDef | cst.BaseExpression
"""What a name of a module stands for: an import, a function, a class, or the value that is assigned."""


@dataclass(frozen=True, slots=True)
class Ref:
    """What a name stands for: a name of a module of the project (`module` is set), or one from elsewhere."""

    name: str
    """The name in the module; or the full dotted name of something from elsewhere."""
    module: Module | None = None
    rest: tuple[str, ...] = ()
    """Attributes after it."""

    @property
    def value(self) -> Bound | None:
        """What it is bound to, where that is in the project and bound once."""
        return None if self.module is None else self.module.bound(self.name)


@dataclass(eq=False)
class Module:
    """A source file."""

    path: Path
    shown: str
    """Its path as messages show it."""
    source: str = field(repr=False)
    wrapper: MetadataWrapper = field(repr=False)
    is_package: bool = False

    @property
    def is_test(self) -> bool:
        """Whether it is a test, by its name or its folder."""
        *folders, name = Path(self.shown).parts
        return name.startswith(("test_", "conftest.")) or name.endswith("_test.py") or "tests" in folders

    @property
    def tree(self) -> cst.Module:
        """Its syntax tree."""
        return self.wrapper.module

    @cached_property
    def positions(self) -> Mapping[cst.CSTNode, CodeRange]:
        """Where each node stands."""
        return self.wrapper.resolve(PositionProvider)

    @cached_property
    def names(self) -> dict[str, list[Bound]]:
        """Each name that is bound at the top, also in a branch there, or by a function that declares it `global`."""
        found: dict[str, list[Bound]] = {}
        for statement in statements_of(self.tree.body):
            for name, value in bindings(statement, self):
                found.setdefault(name, []).append(value)
            if isinstance(statement, cst.FunctionDef):
                for name, value in global_bindings(statement, self):
                    found.setdefault(name, []).append(value)
        return found

    def bound(self, name: str) -> Bound | None:
        """Return what `name` is bound to, where that is one thing; `name = None` beside it does not count."""
        values = [value for value in self.names.get(name, ()) if not is_name(value, "None")]
        return values[0] if len(values) == 1 else None

    def line(self, node: cst.CSTNode) -> int:
        """Return the number of the line where `node` begins."""
        place = self.positions.get(node)
        return place.start.line if place is not None else 0

    def absolute(self, module: cst.BaseExpression | None, dots: int) -> str:
        """Return the full name of what `from ..module import` names."""
        name = dotted(module) if module is not None else ""
        if not dots:
            return name or ""
        folder = self.path.parent
        for _ in range(dots - 1):
            folder = folder.parent
        # A folder with a dot in its name (`shop-1.2/`) is no package, and neither is what it stands in.
        parts = [part for part in folder.parts if part != os.sep]
        start = max((place for place, part in enumerate(parts, start=1) if "." in part), default=0)
        return ".".join(filter(None, [*parts[start:], name]))


@dataclass(eq=False)
class Project:
    """All source files below a path."""

    modules: list[Module]
    unread: list[str] = field(default_factory=list)
    """A line for each file that cannot be parsed."""
    around: str = ""
    """The text of the other files of the repository: they may use what the files below the path define."""

    @cached_property
    def _by_tail(self) -> dict[tuple[str, ...], list[Module]]:
        found: dict[tuple[str, ...], list[Module]] = {}
        for module in self.modules:
            parts = module.path.parent.parts if module.is_package else (*module.path.parent.parts, module.path.stem)
            for start in range(len(parts)):
                found.setdefault(parts[start:], []).append(module)
        return found

    def module_at(self, path: Path) -> Module:
        """Return the module of a file."""
        return next(module for module in self.modules if module.path == path)

    def find(self, name: str, near: Module) -> Module | None:
        """Return the module that `name` means in `near`; of several the one in the nearest folder."""
        if name.partition(".")[0] in ELSEWHERE:
            return None
        found = self._by_tail.get(tuple(name.split(".")), [])
        return max(found, key=lambda one: _common(one.path, near.path), default=None)

    def resolve(self, module: Module, names: list[str], local: Mapping[str, Imported] | None = None) -> Ref | None:
        """Return what the dotted `names` stand for in `module`; None: nothing that is bound at its top.

        Args:
            local: Names that the function around imports.
        """
        bound = (local or {}).get(names[0]) or next(iter(module.names.get(names[0], ())), None)
        if bound is None:
            return None
        if isinstance(bound, Imported):
            return self.lookup([*bound.target.split("."), *names[1:]], module)
        return Ref(names[0], module, tuple(names[1:]))

    def lookup(self, parts: list[str], near: Module, depth: int = 0) -> Ref | None:
        """Return what a full dotted name stands for, over any number of imports."""
        for end in range(len(parts), 0, -1):
            found = self.find(".".join(parts[:end]), near)
            if found is None:
                continue
            if end == len(parts):
                return Ref("", found)
            values = found.names.get(parts[end], ())
            imported = next((value for value in values if isinstance(value, Imported)), None)
            if imported is not None and depth < 10:
                return self.lookup([*imported.target.split("."), *parts[end + 1 :]], found, depth + 1)
            return Ref(parts[end], found, tuple(parts[end + 1 :])) if values else None
        return Ref(".".join(parts))


def read(path: Path) -> Project:
    """Read the Python files below `path`, or the one file that it is."""
    root = path if path.is_dir() else path.parent
    modules, unread = [], []
    for file in sorted(files(path)):
        shown = str(file.relative_to(root))
        try:
            source = file.read_bytes().decode()
            wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
        except (UnicodeDecodeError, cst.ParserSyntaxError) as error:
            unread.append(f"{shown}:{getattr(error, 'raw_line', 1)}: cannot be read: {type(error).__name__}")
            continue
        is_package = file.name == "__init__.py"
        modules.append(Module(file.resolve(), shown, source, wrapper, is_package))
    return Project(modules, unread, around(path))


def around(path: Path) -> str:
    """Return the text of the Python files of the repository that are not below `path`."""
    here = path.resolve()
    root = next((one for one in here.parents if any((one / name).exists() for name in MARKERS)), None)
    if root is None or any((here / name).exists() for name in MARKERS):
        return ""
    others = (file for file in files(root) if here not in (file, *file.parents))
    return "\n".join(file.read_text(errors="replace") for file in others)


def files(path: Path) -> Iterator[Path]:
    """Yield the Python files below `path`, without those of environments and builds."""
    if path.is_file():
        yield path
        return
    for folder, folders, names in os.walk(path):
        here = Path(folder)
        folders[:] = [
            name
            for name in folders
            if name not in SKIPPED and not name.startswith(".") and not (here / name / "pyvenv.cfg").exists()
        ]
        yield from (here / name for name in names if name.endswith(".py"))


# -- reading trees ---------------------------------------------------------------------------------------------------


@cache
def _fields(kind: type[cst.CSTNode]) -> tuple[str, ...]:
    """Return the fields of a kind of node that may hold nodes with a meaning."""
    return tuple(one.name for one in fields(kind) if not one.name.startswith(LAYOUT))


def children(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """Yield the nodes just below `node`, without spaces, commas and brackets."""
    for name in _fields(type(node)):
        value = getattr(node, name)
        if isinstance(value, cst.CSTNode):
            yield value
        elif isinstance(value, list | tuple):
            yield from (one for one in value if isinstance(one, cst.CSTNode))


def walk(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """Yield `node` and everything below it, in the order of the text."""
    yield node
    for child in children(node):
        yield from walk(child)


def own(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """Yield what is below `node`, without what is in functions, lambdas and classes there."""
    for child in children(node):
        yield child
        if not isinstance(child, cst.FunctionDef | cst.Lambda | cst.ClassDef):
            yield from own(child)


def parents_of(node: cst.CSTNode) -> dict[cst.CSTNode, cst.CSTNode]:
    """Return the parent of everything below `node`."""
    return {child: parent for parent in walk(node) for child in children(parent)}


def statements_of(body: object) -> Iterator[cst.CSTNode]:
    """Yield the statements of a block and those in its branches, each small statement of a line for itself."""
    for statement in body if isinstance(body, list | tuple) else getattr(body, "body", ()):
        if isinstance(statement, cst.SimpleStatementLine):
            yield from statement.body
            continue
        yield statement
        if isinstance(statement, cst.If | cst.Try | cst.With | cst.Else | cst.Finally | cst.ExceptHandler):
            yield from statements_of(statement.body)
            for part in ("orelse", "handlers", "finalbody"):
                inner = getattr(statement, part, None)
                if inner:
                    yield from statements_of(list(inner) if isinstance(inner, tuple | list) else [inner])


def bindings(statement: cst.CSTNode, module: Module) -> Iterator[tuple[str, Bound]]:
    """Yield what a statement binds: name and value."""
    if isinstance(statement, cst.FunctionDef | cst.ClassDef):
        yield statement.name.value, statement
    elif isinstance(statement, cst.Assign):
        for target in statement.targets:
            if isinstance(target.target, cst.Name):
                yield target.target.value, statement.value
    elif isinstance(statement, cst.AnnAssign):
        if isinstance(statement.target, cst.Name) and statement.value is not None:
            yield statement.target.value, statement.value
    elif isinstance(statement, cst.Import | cst.ImportFrom):
        yield from imports(statement, module)


def imports(statement: cst.Import | cst.ImportFrom, module: Module) -> Iterator[tuple[str, Imported]]:
    """Yield the names that an import binds."""
    if isinstance(statement, cst.Import):
        for alias in statement.names:
            full = dotted(alias.name) or ""
            if alias.asname is not None:
                yield _alias(alias), Imported(full)
            else:
                yield full.partition(".")[0], Imported(full.partition(".")[0])
    elif not isinstance(statement.names, cst.ImportStar):
        base = module.absolute(statement.module, len(statement.relative))
        for alias in statement.names:
            yield _alias(alias), Imported(f"{base}.{alias.name.value}" if base else str(alias.name.value))


def global_bindings(function: cst.FunctionDef, module: Module) -> Iterator[tuple[str, Bound]]:
    """Yield what a function binds at the top of its module, by `global`."""
    names = {item.name.value for node in own(function) if isinstance(node, cst.Global) for item in node.names}
    for node in own(function) if names else ():
        yield from ((name, value) for name, value in bindings(node, module) if name in names)


def local_imports(function: cst.FunctionDef, module: Module) -> dict[str, Imported]:
    """Return the names that a function imports for itself."""
    statements = (node for node in own(function) if isinstance(node, cst.Import | cst.ImportFrom))
    return {name: value for statement in statements for name, value in imports(statement, module)}


def dotted(node: cst.CSTNode | None) -> str | None:
    """Return `a.b.c` as text; None for anything else."""
    if isinstance(node, cst.Name):
        return node.value
    if isinstance(node, cst.Attribute):
        base = dotted(node.value)
        return None if base is None else f"{base}.{node.attr.value}"
    return None


def is_name(node: object, *names: str) -> bool:
    """Tell whether `node` is one of these names."""
    return isinstance(node, cst.Name) and node.value in names


def called(node: cst.CSTNode, *names: str) -> cst.BaseExpression | None:
    """Return what a method of one of these names is called on: `x` of `x.close()`."""
    if isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute) and node.func.attr.value in names:
        return node.func.value
    return None


def argument(call: cst.Call, name: str) -> cst.Arg | None:
    """Return the argument that is passed by this name."""
    return next((arg for arg in call.args if arg.keyword is not None and arg.keyword.value == name), None)


def expression(statement: cst.CSTNode) -> cst.BaseExpression | None:
    """Return the one expression that a line consists of."""
    if isinstance(statement, cst.SimpleStatementLine) and len(statement.body) == 1:
        only = statement.body[0]
        return only.value if isinstance(only, cst.Expr) else None
    return None


def block(node: cst.CSTNode | None) -> list[cst.BaseStatement]:
    """Return the statements of a block; of one that is written on the line of its head, that line."""
    if isinstance(node, cst.IndentedBlock):
        return list(node.body)
    if isinstance(node, cst.SimpleStatementSuite):
        return [cst.SimpleStatementLine(node.body)]
    return []


def code(node: cst.CSTNode) -> str:
    """Return a node as text."""
    return cst.Module([]).code_for_node(node).strip()


def _alias(alias: cst.ImportAlias) -> str:
    name = alias.asname.name if alias.asname is not None else alias.name
    return dotted(name) or ""


def _common(one: Path, other: Path) -> int:
    return len(os.path.commonpath([one, other]))
