"""The project's code, as far as tasks are defined in it: each module's names, and its syntax tree."""

from __future__ import annotations

import ast
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from celery import Celery, Task

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_OURS = "celery_alchemy."


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the project."""

    name: str
    path: str
    names: dict[str, Any]
    tree: ast.Module

    def where(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


def modules_of(app: Celery) -> dict[str, Module]:
    """Return, by name, the project's modules that define tasks, task classes or the app, and those beside them.

    What was installed is no part of the project. A module without source is left out.
    """
    names = {getattr(task.run, "__module__", None) for task in tasks_of(app).values()}
    names |= {cls.__module__ for task in tasks_of(app).values() for cls in type(task).__mro__}
    packages = {str(name).partition(".")[0] for name in names if name}
    names |= {name for name in list(sys.modules) if name.partition(".")[0] in packages}
    for name, module in list(sys.modules.items()):
        if any(value is app for value in list(getattr(module, "__dict__", {}).values())):
            names.add(name)
    found = _read_all(names)
    beside = {Path(module.path).parent for module in found.values()}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if path and Path(path).parent in beside:
            names.add(name)
    return _read_all(names)


def _read_all(names: set[Any]) -> dict[str, Module]:
    found = (_read(sys.modules.get(name)) for name in sorted(str(name) for name in names))
    return {module.name: module for module in found if module is not None}


def tasks_of(app: Celery) -> dict[str, Task]:
    """Return the project's tasks, by name."""
    return {name: task for name, task in app.tasks.items() if not name.startswith("celery.")}


def task_classes(app: Celery) -> Iterator[type]:
    """Yield the project's classes of tasks, once each: the bases that somebody has written."""
    seen = set()
    for task in tasks_of(app).values():
        for cls in type(task).__mro__[1:]:
            if cls not in seen and issubclass(cls, Task) and not cls.__module__.startswith(("celery.", _OURS)):
                seen.add(cls)
                yield cls


def class_node(module: Module, name: str) -> ast.ClassDef | None:
    """Return where `module` defines the class."""
    return next((node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef) and node.name == name), None)


def function_node(modules: dict[str, Module], function: Any) -> tuple[Module, ast.FunctionDef] | None:
    """Return where the project defines `function`, whatever is wrapped around it."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    module = modules.get(getattr(function, "__module__", "") or "")
    name = getattr(function, "__name__", "")
    for node in ast.walk(module.tree) if module is not None else ():
        if isinstance(node, ast.FunctionDef) and node.name == name:
            assert module is not None
            return module, node
    return None


def calls(node: ast.AST, *names: str) -> list[ast.Call]:
    """Return the calls below `node` of a method or function with one of these names, in the order of their lines."""
    found = [
        one
        for one in ast.walk(node)
        if isinstance(one, ast.Call)
        and (
            (isinstance(one.func, ast.Attribute) and one.func.attr in names)
            or (isinstance(one.func, ast.Name) and one.func.id in names)
        )
    ]
    return sorted(found, key=lambda call: call.lineno)


def value_of(module: Module, node: ast.AST) -> Any:
    """Return what a name, or a dotted name, stands for in `module`; None where that is not known without running it."""
    if isinstance(node, ast.Name):
        return module.names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = value_of(module, node.value)
        return inspect.getattr_static(owner, node.attr, None) if owner is not None else None
    return None


def _read(module: ModuleType | None) -> Module | None:
    path = getattr(module, "__file__", None)
    if module is None or not path or not path.endswith(".py") or module.__name__.startswith(_OURS):
        return None
    if path.startswith(_LIBRARIES) and ("site-packages" in path or "dist-packages" in path):
        return None
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, SyntaxError, TypeError):
        return None
    return Module(module.__name__, path, dict(module.__dict__), tree)
