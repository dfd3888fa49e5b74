"""Sessions that a task does not make itself: the functions of the project that it calls do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import libcst as cst

from .makers import SESSIONS, Makers
from .source import Module, local_imports, own, parents_of, walk
from .tasks import Tasks
from .uses import Scope, Uses


@dataclass(frozen=True, slots=True)
class Helper:
    """A function that opens a Session of its own, or uses one that stands at the top of a module."""

    module: Module
    name: str
    node: cst.CSTNode
    """Where it does."""
    how: str
    is_own: bool
    """It opens the Session."""

    def __str__(self) -> str:
        where = f"{self.module.shown}:{self.module.line(self.node)}"
        return f"{self.name}(), which it calls, {self.how} ({where})"


class Helpers:
    """Finds them."""

    def __init__(self, makers: Makers, tasks: Tasks, uses: Uses) -> None:
        self._makers, self._tasks, self._uses = makers, tasks, uses

    def below(self, scope: Scope, known: set[cst.CSTNode]) -> Iterator[Helper]:
        """Yield those that a function calls, directly or through others.

        Args:
            known: Functions whose Session is accounted for.
        """
        seen = {scope.function, *known}
        waiting = [scope]
        while waiting:
            for called in list(self._called(waiting.pop(0))):
                if called.function in seen:
                    continue
                seen.add(called.function)
                if (helper := self._look(called)) is not None:
                    yield helper
                else:
                    waiting.append(called)

    def _called(self, scope: Scope) -> Iterator[Scope]:
        """Yield the functions of the project that a function calls; not the tasks that it sends."""
        for node in own(scope.function):
            found = self._uses.callee(scope, node.func) if isinstance(node, cst.Call) else None
            if found is None:
                continue
            module, target, cls = found
            if isinstance(target, cst.ClassDef):
                found = self._uses.find_method(module, target, "__init__")
                if found is None:
                    continue
                module, target, cls = found
            if isinstance(target, cst.FunctionDef) and not self._tasks.is_task(module, target):
                yield Scope(module, target, lambda node: False, cls=cls)

    def _look(self, scope: Scope) -> Helper | None:
        """Return what a function does with a Session that it was not given."""
        module, function = scope.module, scope.function
        is_constructor = scope.cls is not None and function.name.value == "__init__"
        name = (scope.cls if scope.cls is not None and is_constructor else function).name.value
        local = local_imports(function, module)
        for node in own(function):
            if isinstance(node, cst.Call):
                made = self._makers.of_call(module, node, local)
                if made is not None or self._makers.outside(module, node.func, local) in SESSIONS:
                    return Helper(module, name, node, "opens a Session of its own", is_own=True)
        parents = parents_of(function)
        for node in walk(function.body):
            if not isinstance(node, cst.Name | cst.Attribute):
                continue
            if isinstance(above := parents.get(node), cst.Attribute) and above.attr is node:
                continue
            ref = self._makers.resolve(module, node, local)
            if ref is None or ref.module is None or not isinstance(ref.value, cst.Call):
                continue
            if self._makers.outside(ref.module, ref.value.func) == "flask_sqlalchemy.SQLAlchemy":
                if ref.rest[:1] == ("session",):
                    return Helper(module, name, node, "uses Flask-SQLAlchemy's Session", is_own=False)
            elif not ref.rest and self._is_outer(module, node, ref.module, ref.value):
                return Helper(module, name, node, f"uses {ref.name}, a Session of its module", is_own=False)
        return None

    def _is_outer(self, module: Module, node: cst.CSTNode, home: Module, value: cst.Call) -> bool:
        maker = self._makers.of_maker(module, node, None)
        made = self._makers.of_call(home, value)
        return (maker is not None and maker.scoped) or (made is not None and not made.is_block)
