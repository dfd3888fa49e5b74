"""What nothing refers to any more, once the tasks are rewritten: imports, helper functions, classes, factories."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper

from .makers import Makers
from .source import Imported, Module, Project, Ref, bindings, block, called, children, code, dotted, own, walk

Place = tuple[Path, str]
"""A name of a module."""


class Leftovers:
    """The project after its tasks are rewritten."""

    def __init__(self, project: Project, changed: Mapping[Path, str]) -> None:
        self._old = {module.path: module for module in project.modules}
        self._around = project.around
        self.texts: dict[Path, str] = {path: module.source for path, module in self._old.items()} | dict(changed)
        self.read_again()

    def read_again(self) -> None:
        """Parse what has changed."""
        modules = []
        for path, old in self._old.items():
            text = self.texts[path]
            if old.source == text:
                modules.append(old)
                continue
            wrapper = MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True)
            modules.append(Module(path, old.shown, text, wrapper, old.is_package))
        self.project: Project = Project(modules, around=self._around)
        self.makers: Makers = Makers(self.project)
        self.modules: dict[Path, Module] = {module.path: module for module in modules}

    # -- who refers to a name ------------------------------------------------------------------------------------------

    def is_used(self, place: Place) -> bool:
        """Tell whether anything refers to a name of a module, but its own definition and imports."""
        path, name = place
        if self._is_used_around(name):
            return True
        ref = Ref(name, self.modules[path])
        return any(self._mentions(module, ref) for module in self.modules.values())

    def _is_used_around(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", self._around) is not None

    def _mentions(self, module: Module, ref: Ref) -> bool:
        if ref.name not in module.source:
            return False
        here = module is ref.module
        skipped = set(walk_all(definitions(module, ref.name))) if here else set()
        skipped |= set(walk_all(self.lifecycle(module, {ref.name}) if here else ()))
        if any(self._means(module, values, ref) for values in _all_imports(module).values()):
            return True
        for node in _outside_imports(module.tree):
            if node in skipped:
                continue
            if isinstance(node, cst.SimpleString) and _names(node, ref.name):
                return True
            if isinstance(node, cst.ImportStar):
                return True
            if isinstance(node, cst.Name) and here and node.value == ref.name:
                return True
            if isinstance(node, cst.Attribute) and node.attr.value == ref.name:
                found = self.makers.resolve(module, node)
                if found is not None and found.module is ref.module and found.name == ref.name:
                    return True
        return False

    def _means(self, module: Module, values: list[Imported], ref: Ref) -> bool:
        for value in values:
            found = self.project.lookup(value.target.split("."), module)
            if found is not None and found.module is ref.module and found.name == ref.name:
                return True
        return False

    def lifecycle(self, module: Module, names: set[str]) -> list[cst.FunctionDef]:
        """Return signal handlers that do nothing but make and dispose what has these names."""
        found = []
        for node in module.tree.body:
            if not isinstance(node, cst.FunctionDef) or len(node.decorators) != 1:
                continue
            decorator = node.decorators[0].decorator
            signal = decorator.func if isinstance(decorator, cst.Call) else decorator
            outside = self.makers.outside(module, signal) or ""
            if outside.startswith("celery.signals.worker_process_") and _only_about(node, module, names):
                found.append(node)
        return found

    # -- taking out ----------------------------------------------------------------------------------------------------

    def remove_unused(self, places: set[Place]) -> set[Place]:
        """Take out the definitions of `places` that nothing refers to; return those that are left."""
        left = set(places)
        again = True
        while again:
            again = False
            for path, name in sorted(left):
                if not self.is_used((path, name)):
                    self.remove({(path, name)})
                    left.discard((path, name))
                    again = True
        return left

    def remove(self, places: set[Place]) -> None:
        """Take definitions out."""
        for path in {path for path, _ in places}:
            module = self.modules[path]
            names = {name for one, name in places if one == path}
            gone = {one for name in names for one in definitions(module, name)}
            gone |= set(self.lifecycle(module, names))
            self.texts[path] = module.tree.visit(_Without(gone)).code
        self.read_again()

    def remove_imports(self) -> None:
        """Take out imports that were used before, and are not any more."""
        for path, module in self.modules.items():
            old = self._old[path]
            if old.source == module.source:
                continue
            before = {node.value for node in _outside_imports(old.tree) if isinstance(node, cst.Name)}
            now = {node.value for node in _outside_imports(module.tree) if isinstance(node, cst.Name)}
            unused = {name for name in before - now if not self._is_passed_on(module, name)}
            if unused:
                tree = module.tree.visit(_WithoutImports(module, unused))
                self.texts[path] = tree.code
        self.read_again()

    def _is_passed_on(self, module: Module, name: str) -> bool:
        """Tell whether another module imports a name that this one imports."""
        if self._is_used_around(name) and any(isinstance(one, Imported) for one in module.names.get(name, ())):
            return True
        quoted = any(_names(node, name) for node in walk(module.tree) if isinstance(node, cst.SimpleString))
        return quoted or any(
            value.target.endswith(f".{name}") and self.project.find(value.target.rpartition(".")[0], other) is module
            for other in self.modules.values()
            if other is not module and name in other.source
            for values in _all_imports(other).values()
            for value in values
        )


def definitions(module: Module, name: str) -> list[cst.CSTNode]:
    """Return the statements at the top of a module that bind a name, and nothing else."""
    found: list[cst.CSTNode] = []
    for statement in module.tree.body:
        if isinstance(statement, cst.SimpleStatementLine) and len(statement.body) == 1:
            only = statement.body[0]
            if not isinstance(only, cst.Import | cst.ImportFrom):
                found += [statement for bound, _ in bindings(only, module) if bound == name]
        elif isinstance(statement, cst.FunctionDef | cst.ClassDef) and statement.name.value == name:
            found.append(statement)
    return found


def walk_all(nodes: object) -> Iterator[cst.CSTNode]:
    """Yield everything below several nodes."""
    for node in nodes:  # type: ignore[attr-defined]
        yield from walk(node)


def _outside_imports(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """Yield all nodes, without those of imports and names of keyword arguments."""
    for child in children(node):
        if isinstance(child, cst.FunctionDef):
            own_names = {name.value for name in _parameters(child)}
            yield child
            inside = _outside_imports(child)
            yield from (one for one in inside if not (isinstance(one, cst.Name) and one.value in own_names))
            continue
        if isinstance(child, cst.Import):
            continue
        if isinstance(child, cst.ImportFrom):
            if isinstance(child.names, cst.ImportStar):
                yield child.names
            continue
        if isinstance(child, cst.Arg):
            yield child.value
            yield from _outside_imports(child.value)
            continue
        yield child
        yield from _outside_imports(child)


def _parameters(function: cst.FunctionDef) -> Iterator[cst.Name]:
    parameters = function.params
    for one in (*parameters.posonly_params, *parameters.params, *parameters.kwonly_params):
        yield one.name


def _all_imports(module: Module) -> dict[str, list[Imported]]:
    """Return the names that imports bind, at the top and in functions."""
    found: dict[str, list[Imported]] = {}
    for node in walk(module.tree):
        if isinstance(node, cst.Import | cst.ImportFrom):
            for name, value in bindings(node, module):
                if isinstance(value, Imported):
                    found.setdefault(name, []).append(value)
    return found


def _names(node: cst.SimpleString, name: str) -> bool:
    text = node.value.strip("rRbBfFuU").strip("'\"")
    if text.startswith("celery_alchemy"):
        return False
    return text == name or text.endswith((f".{name}", f":{name}"))


def _only_about(function: cst.FunctionDef, module: Module, names: set[str]) -> bool:
    """Tell whether a function only assigns and disposes what has these names, or what is made of it."""
    bound = {
        name for node in own(function) if isinstance(node, cst.Global) for name in [i.name.value for i in node.names]
    }
    if not bound & names and not any(isinstance(node, cst.Name) and node.value in names for node in own(function)):
        return False
    for line in own(function):
        if not isinstance(line, cst.SimpleStatementLine):
            continue
        for small in line.body:
            fine = isinstance(small, cst.Global | cst.Pass)
            if isinstance(small, cst.Assign):
                fine = all(code(target.target) in bound for target in small.targets)
            elif isinstance(small, cst.Expr):
                base = called(small.value, "dispose", "close_all", "remove")
                fine = isinstance(small.value, cst.SimpleString) or dotted(base) is not None
            if not fine:
                return False
    return bool(block(function.body))


class _Without(cst.CSTTransformer):
    def __init__(self, gone: set[cst.CSTNode]) -> None:
        super().__init__()
        self._gone = gone

    def on_leave(self, original_node: cst.CSTNode, updated_node: cst.CSTNode) -> object:  # type: ignore[override]
        if original_node in self._gone:
            return cst.RemoveFromParent()
        return super().on_leave(original_node, updated_node)


class _WithoutImports(cst.CSTTransformer):
    def __init__(self, module: Module, names: set[str]) -> None:
        super().__init__()
        self._module, self._names = module, names

    def on_leave(self, original_node: cst.CSTNode, updated_node: cst.CSTNode) -> object:  # type: ignore[override]
        if not isinstance(original_node, cst.Import | cst.ImportFrom) or isinstance(
            original_node.names, cst.ImportStar
        ):
            return super().on_leave(original_node, updated_node)
        bound = [name for name, _ in bindings(original_node, self._module)]
        kept = [alias for alias, name in zip(original_node.names, bound, strict=True) if name not in self._names]
        if not kept:
            return cst.RemoveFromParent()
        if len(kept) == len(bound):
            return updated_node
        kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return updated_node.with_changes(names=kept)
