"""Which functions and classes of a project are Celery tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import libcst as cst

from .makers import Makers
from .source import Module, Project, Ref, argument, block, is_name, own, statements_of, walk

SHARED = {"celery.shared_task", "celery.app.shared_task", "celery.task", "celery.task.task", "celery.decorators.task"}
TASKS = {"celery.Task", "celery.app.task.Task", "celery.task.Task", "celery.app.Task", "celery.task.base.Task"}
OURS = "celery_alchemy.DatabaseTask"
Kind = Literal["celery", "ours"]


@dataclass(frozen=True, eq=False, slots=True)
class Task:
    """A task: a decorated function, or a class with `run`."""

    module: Module
    node: cst.FunctionDef
    """Its function, or its method `run`."""
    cls: cst.ClassDef | None
    decorator: cst.Decorator | None
    app: Ref | None
    """The Celery app it is decorated with; None: `shared_task`, and classes."""
    base: cst.BaseExpression | None
    """What stands after `base=`."""
    nested: bool = False
    """It is defined in a function."""

    @property
    def name(self) -> str:
        """As messages show it."""
        return self.cls.name.value if self.cls is not None else self.node.name.value

    @property
    def top(self) -> cst.FunctionDef | cst.ClassDef:
        """What is rewritten as a whole."""
        return self.cls or self.node

    @property
    def this(self) -> str | None:
        """The name of its first parameter where that is the task."""
        if self.cls is None and not self.option("bind", "True"):
            return None
        first = next(iter([*self.node.params.posonly_params, *self.node.params.params]), None)
        return first.name.value if first is not None else None

    def option(self, name: str, value: str) -> bool:
        """Tell whether the decorator says `name=value`."""
        call = self.decorator.decorator if self.decorator is not None else None
        found = argument(call, name) if isinstance(call, cst.Call) else None
        return found is not None and is_name(found.value, value)


class Tasks:
    """Finds the tasks of a project, its Celery apps, and the classes that tasks derive from."""

    def __init__(self, project: Project, makers: Makers) -> None:
        self._project = project
        self._makers = makers

    def all(self) -> Iterator[Task]:
        """Yield the tasks, in the order of the files."""
        for module in self._project.modules:
            if module.is_test or "task" not in module.source.lower():
                continue
            top = set(statements_of(module.tree.body))
            for node in walk(module.tree):
                if isinstance(node, cst.FunctionDef):
                    yield from self._decorated(module, node, nested=node not in top)
                elif isinstance(node, cst.ClassDef) and node in top and self.kind(module, node) is not None:
                    run = method(node, "run")
                    if run is not None:
                        yield Task(module, run, node, None, None, None)

    def is_task(self, module: Module, function: cst.FunctionDef) -> bool:
        """Tell whether a function is decorated as a task."""
        return any(True for _ in self._decorated(module, function, nested=False))

    def _decorated(self, module: Module, function: cst.FunctionDef, *, nested: bool) -> Iterator[Task]:
        for decorator in function.decorators:
            call = decorator.decorator
            name = call.func if isinstance(call, cst.Call) else call
            app = self._app_of(module, name)
            if app is None and self._makers.outside(module, name) not in SHARED:
                continue
            base = argument(call, "base") if isinstance(call, cst.Call) else None
            ref = app if isinstance(app, Ref) else None
            yield Task(module, function, None, decorator, ref, base.value if base is not None else None, nested)

    def _app_of(self, module: Module, name: cst.CSTNode) -> Ref | str | None:
        """Return the Celery app of `app.task`; text where it looks like one and cannot be found."""
        if not isinstance(name, cst.Attribute) or name.attr.value != "task":
            return None
        ref = self._makers.resolve(module, name.value)
        if ref is None:
            return "unknown" if isinstance(name.value, cst.Name) and looks_like_app(name.value.value) else None
        if ref.module is None:
            return "unknown" if looks_like_app(ref.name) else None
        return ref if self.is_app(ref) or looks_like_app(ref.name) else None

    def is_app(self, ref: Ref) -> bool:
        """Tell whether a name of the project is a Celery app: made there, or by a function that makes one."""
        value = ref.value
        if ref.rest or ref.module is None or not isinstance(value, cst.Call):
            return False
        if self._makers.outside(ref.module, value.func) in {"celery.Celery", "celery.app.base.Celery"}:
            return True
        made_by = self._makers.resolve(ref.module, value.func)
        function = made_by.value if made_by is not None else None
        if made_by is None or made_by.module is None or not isinstance(function, cst.FunctionDef):
            return False
        calls = (node for node in own(function) if isinstance(node, cst.Call))
        return any(self._makers.outside(made_by.module, call.func) == "celery.Celery" for call in calls)

    def apps(self) -> list[Ref]:
        """Return the Celery apps of the project."""
        found = []
        for module in self._project.modules:
            if "elery" in module.source and not module.is_test:
                refs = (Ref(name, module) for name in module.names)
                found += [ref for ref in refs if self.is_app(ref)]
        return found

    # -- classes -------------------------------------------------------------------------------------------------------

    def chain(self, module: Module, node: cst.ClassDef) -> list[tuple[Module, cst.ClassDef]]:
        """Return a class and the classes of the project that it derives from, the nearest first."""
        found = [(module, node)]
        for base in node.bases:
            ref = self._makers.resolve(module, base.value)
            if ref is None or ref.module is None or ref.rest or not isinstance(ref.value, cst.ClassDef):
                continue
            if all(ref.value is not known for _, known in found):
                found += self.chain(ref.module, ref.value)
        return found

    def kind(self, module: Module, node: cst.ClassDef) -> Kind | None:
        """Tell which task class a class derives from: Celery's, or ours."""
        kinds = [self.kind_of_base(one, base.value) for one, cls in self.chain(module, node) for base in cls.bases]
        return "ours" if "ours" in kinds else "celery" if "celery" in kinds else None

    def kind_of_base(self, module: Module, node: cst.CSTNode) -> Kind | None:
        """Tell whether a base class is Celery's Task, or our DatabaseTask."""
        name = self._makers.outside(module, node)
        if name is not None and name.startswith("celery_alchemy.") and name.endswith(".DatabaseTask"):
            return "ours"
        if name == OURS:
            return "ours"
        of_app = isinstance(node, cst.Attribute) and node.attr.value == "Task" and looks_like_app(_last(node.value))
        return "celery" if name in TASKS or of_app else None


def method(node: cst.ClassDef, name: str) -> cst.FunctionDef | None:
    """Return the method of this name that a class itself has."""
    found = (one for one in block(node.body) if isinstance(one, cst.FunctionDef) and one.name.value == name)
    return next(found, None)


def looks_like_app(name: str) -> bool:
    """Tell whether people call a Celery app so."""
    last = name.rpartition(".")[2].lower()
    return "celery" in last or last in {"app", "current_app", "worker", "queue"}


def _last(node: cst.CSTNode) -> str:
    return node.attr.value if isinstance(node, cst.Attribute) else getattr(node, "value", "") or ""
