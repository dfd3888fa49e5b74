"""What names and attributes stand for, across the modules of a project."""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .project import Module, Project
from .state import Entry, Event, Frame, State
from .values import (
    UNKNOWN,
    Function,
    Value,
    bases_of,
    constant,
    external,
    is_mapped,
    is_ours,
    is_task_class,
    literal,
)

#: Methods of a Celery task that are called after its result is stored, and not for each ending.
LATE_HOOKS = ("after_return", "on_success", "on_failure", "on_retry")
_SESSION_NAMES = {"db", "session", "db_session"}


class Names(ABC):
    """The project's names. Modules are run, as it were, when they are first asked for one."""

    def __init__(self, project: Project, notify: Callable[[Event], None]) -> None:
        self.project = project
        self.notify = notify
        self.envs: dict[str, dict[str, Value]] = {}
        self.imports: dict[str, set[str]] = {}
        """Of each module, those that it imports when it is imported."""
        self.frames: list[Frame] = []
        self.stack: list[ast.AST] = []
        self.entry: Entry = Entry("import")
        self.quiet: int = 0
        self.steps: int = 0
        self.apps: list[Value] = []
        self.default_base: Value | None = None
        """What `task_cls` of a Celery app names."""
        self.later: dict[str, dict[str, list[tuple[Function, ast.expr]]]] = {}
        self.asked: set[Any] = set()
        self.reached: set[ast.AST] = set()
        """Functions that tasks and their hooks call."""
        self.functions: dict[ast.AST, Value] = {}
        """Every function that was defined, by its node."""
        self.classes: dict[ast.AST, Value] = {}

    @abstractmethod
    def evaluate(self, node: ast.expr | None, state: State) -> Value:
        """Return what an expression stands for."""

    @abstractmethod
    def run_module(self, module: Module) -> None:
        """Read a module from its first line to its last, as an import does."""

    @abstractmethod
    def inline(
        self, function: Value, args: list[Value], keywords: dict[str, Value], state: State, node: ast.AST
    ) -> Value:
        """Go through a function as a call does."""

    @property
    def frame(self) -> Frame:
        return self.frames[-1]

    def emit(self, kind: str, node: ast.AST, state: State, value: Value | None = None, **info: Any) -> None:
        """Tell the rules."""
        if not self.quiet:
            self.notify(Event(kind, self.frame.module, node, state, self.entry, value, info))

    @contextmanager
    def silently(self, module: Module) -> Iterator[State]:
        """Look something up in `module`, without telling the rules."""
        self.quiet += 1
        self.frames.append(Frame(module))
        try:
            yield State({})
        finally:
            self.frames.pop()
            self.quiet -= 1

    def env_of(self, module: Module) -> dict[str, Value]:
        """Return what the names of a module stand for, once it is imported."""
        if module.name not in self.envs:
            self.envs[module.name] = {}
            self.run_module(module)
        return self.envs[module.name]

    def lookup(self, name: str, state: State) -> Value:
        """Return what a name stands for here."""
        for env in (state.env, *state.outer):
            if name in env:
                found = self.resolve(env[name])
                if self.frame.function is not None or not _is_empty(found):
                    return found
        return self.of_module(self.frame.module, name) or external(name)

    def of_module(self, module: Module, name: str) -> Value | None:
        """Return what a module calls `name`; what its functions assign later stands in for None."""
        found = self.env_of(module).get(name)
        found = self.resolve(found) if found is not None else None
        if _is_empty(found):
            later = self._assigned_later(module, name)
            return later or found
        return found

    def resolve(self, value: Value) -> Value:
        """Return what an imported name stands for."""
        if value.kind != "import":
            return value
        key = ("import", value.name)
        if key in self.asked:
            return UNKNOWN
        self.asked.add(key)
        try:
            return self.imported(value.parts["module"], value.parts["attr"])
        finally:
            self.asked.discard(key)

    def imported(self, name: str, attr: str | None) -> Value:
        """Return what `from name import attr`, or `import name`, gives."""
        module = self.project.find(name)
        if module is None:
            inner = self.project.find(f"{name}.{attr}") if attr else None
            if inner is not None:
                return Value("module", inner.name, module=inner)
            if attr is None and any(known.startswith(f"{name}.") for known in self.project.modules):
                return Value("module", name)
            return external(f"{name}.{attr}" if attr else name)
        if attr is None:
            return Value("module", module.name, module=module)
        found = self.of_module(module, attr)
        if found is not None:
            return found
        inner = self.project.find(f"{name}.{attr}")
        return Value("module", inner.name, module=inner) if inner is not None else UNKNOWN

    def _assigned_later(self, module: Module, name: str) -> Value | None:
        """Return what functions of a module assign to one of its names by `global`."""
        if module.name not in self.later:
            known = self.later[module.name] = {}
            for function in ast.walk(module.tree):
                if not isinstance(function, Function):
                    continue
                names = {name for one in ast.walk(function) if isinstance(one, ast.Global) for name in one.names}
                for one in ast.walk(function) if names else ():
                    if not isinstance(one, ast.Assign):
                        continue
                    for target in one.targets:
                        if isinstance(target, ast.Name) and target.id in names:
                            known.setdefault(target.id, []).append((function, one.value))
        for function, expression in self.later[module.name].get(name, ()):
            found = self.evaluate_later(module, function, expression)
            if found is not None and not _is_empty(found):
                return found
        return None

    def evaluate_later(
        self, module: Module, function: Function, expression: ast.expr, owner: Value | None = None
    ) -> Value | None:
        """Return what an expression inside a function stands for, without running what comes before it."""
        if expression in self.asked or not isinstance(expression, ast.expr):
            return None
        self.asked.add(expression)
        try:
            with self.silently(module) as state:
                if owner is not None and function.args.args:
                    state.env[function.args.args[0].arg] = owner
                for argument in function.args.args[1:] if owner is not None else function.args.args:
                    state.env.setdefault(argument.arg, self.annotated(argument.annotation, state))
                found = self.evaluate(expression, state)
                return found.but(later=True) if found.kind in {"session", "engine", "instance"} else found
        finally:
            self.asked.discard(expression)

    def annotated(self, annotation: ast.expr | None, state: State) -> Value:
        """Return a value of which only the type is known."""
        if annotation is None:
            return UNKNOWN
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            try:
                annotation = ast.parse(annotation.value, mode="eval").body
            except SyntaxError:
                return UNKNOWN
        if isinstance(annotation, ast.BinOp):
            left = self.annotated(annotation.left, state)
            return left if left is not UNKNOWN else self.annotated(annotation.right, state)
        if isinstance(annotation, ast.Subscript):
            inner = annotation.slice
            first = inner.elts[0] if isinstance(inner, ast.Tuple) and inner.elts else inner
            name = self.evaluate(annotation.value, state).last
            return self.annotated(first, state) if name in {"Annotated", "Optional", "Union"} else UNKNOWN
        kind = self.evaluate(annotation, state)
        if kind.kind == "typed":
            typed: Value = kind.parts["value"]
            return typed
        return self.instance_of(kind, annotation)

    def instance_of(self, kind: Value, node: ast.AST) -> Value:
        """Return an object of a class."""
        if kind.kind == "external":
            if kind.root == "celery_alchemy" and kind.last in {"CurrentSession", "CurrentAsyncSession"}:
                return Value("session", "ours", node, parts={"key": "ours", "injected": True})
            if kind.root == "celery_alchemy" and is_ours(kind):
                return Value("instance", node=node, parts={"cls": kind, "fields": {}})
            if kind.root in {"sqlalchemy", "sqlmodel"} and kind.last in {"Session", "AsyncSession", "scoped_session"}:
                return Value("session", node=node)
            return UNKNOWN
        if kind.kind != "class":
            return UNKNOWN
        if is_mapped(kind):
            return Value("entity", node=node, parts={"cls": kind})
        special = self.special_base(kind)
        if special:
            return Value(special, node=node, parts={"cls": kind})
        return Value("instance", node=node, module=kind.module, parts={"cls": kind, "fields": {}})

    @staticmethod
    def special_base(kind: Value) -> str:
        """Return the kind of a project's class whose base is one of SQLAlchemy, Flask-SQLAlchemy or Celery."""
        for one in bases_of(kind):
            if one.kind == "external":
                for root, last, found in (
                    ("sqlalchemy", "Session", "session"),
                    ("sqlalchemy", "AsyncSession", "session"),
                    ("sqlmodel", "Session", "session"),
                    ("flask_sqlalchemy", "SQLAlchemy", "flask_db"),
                    ("celery", "Celery", "celery"),
                ):
                    if one.root == root and one.last == last:
                        return found
        return ""

    # -- attributes ----------------------------------------------------------------------------------------------------

    def attribute(self, value: Value, attr: str, state: State, node: ast.AST) -> Value:
        """Return what an attribute of a value stands for."""
        cls = value if value.kind == "class" else value.parts.get("cls")
        if value.kind == "external":
            return Value("external", f"{value.name}.{attr}", value.node, parts=value.parts)
        if value.kind == "module":
            return self.imported(value.name, attr)
        if value.kind == "instance" and attr in value.parts["fields"]:
            return self.resolve(value.parts["fields"][attr])
        if cls is not None and value.kind != "entity":
            found = self._member(value, cls, attr, state, node)
            if found is not None:
                return found
        of_kind = getattr(self, f"_of_{value.kind}", None)
        found = of_kind(value, attr, state, node) if of_kind is not None else None
        return found or Value("method", attr, node, parts={"of": value})

    def _member(self, value: Value, cls: Value, attr: str, state: State, node: ast.AST) -> Value | None:
        """Return what a class of the project says of an attribute."""
        empty = None
        for one in bases_of(cls):
            found = one.parts["env"].get(attr) if one.kind == "class" else None
            if found is None:
                continue
            found = self.resolve(found)
            if found.kind == "function" and value.kind != "class" and "static" not in found.parts["flags"]:
                if "property" in found.parts["flags"]:
                    return self.inline(found, [value], {}, state, node)
                return Value("bound", attr, node, parts={"function": found, "self": value})
            if found.kind == "function" and "class" in found.parts["flags"]:
                return Value("bound", attr, node, parts={"function": found, "self": value})
            if not _is_empty(found):
                return found
            empty = found
        return self._kept(value, cls, attr) or empty

    def _kept(self, value: Value, cls: Value, attr: str) -> Value | None:
        """Return what methods of a class keep in an attribute of `self`."""
        for one in bases_of(cls):
            for function, expression in one.parts.get("kept", {}).get(attr, ()) if one.kind == "class" else ():
                assert one.module is not None
                found = self.evaluate_later(one.module, function, expression, value)
                if found is not None and not _is_empty(found) and found.name != "?":
                    return found
        return None

    def _of_class(self, value: Value, attr: str, state: State, node: ast.AST) -> Value | None:
        if is_mapped(value):
            flask = next((one.parts["of"] for one in bases_of(value) if one.kind == "method"), None)
            if attr == "query":
                session = flask_session(flask) if flask is not None else Value("session", "?", value.node)
                return Value("query", node=node, parts={"session": session, "cls": value})
            known = {"metadata": "sqlalchemy.MetaData()", "__table__": "sqlalchemy.Table()"}
            return external(known.get(attr, "?"))
        return None

    def _of_base(self, value: Value, attr: str, state: State, node: ast.AST) -> Value | None:
        return external("sqlalchemy.MetaData()") if attr == "metadata" else None

    def _of_instance(self, value: Value, attr: str, state: State, node: ast.AST) -> Value | None:
        cls = value.parts["cls"]
        if is_ours(cls) and attr == "db":
            return Value("session", "ours", node, parts={"key": "ours"})
        if is_ours(cls) or is_task_class(cls):
            if attr in _SESSION_NAMES | {"delay_on_commit", "apply_async_on_commit"} and value.parts.get("bare"):
                self.emit("no-base", node, state, value, attr=attr)
            return Value("method", attr, node, parts={"of": Value("task", value.name, value.node, parts=value.parts)})
        if any(one.kind == "external" for one in bases_of(cls)):
            return external("?")
        return None

    def _of_flask_db(self, value: Value, attr: str, state: State, node: ast.AST) -> Value | None:
        if attr == "session":
            return flask_session(value)
        if attr == "engine":
            return Value("engine", "flask", value.node, parts={"key": ("engine", value.node)})
        if attr == "metadata":
            return external("sqlalchemy.MetaData()")
        return external(f"sqlalchemy.{attr}") if attr in {"select", "text", "insert", "update", "delete"} else None

    def _of_alchemy(self, value: Value, attr: str, state: State, node: ast.AST) -> Value | None:
        if attr == "session":
            return Value("session", "ours", node, parts={"key": "ours"})
        return Value("engine", "ours", node, parts={"key": "ours engine"}) if attr.endswith("engine") else None

    def _of_celery(self, value: Value, attr: str, state: State, node: ast.AST) -> Value | None:
        return external("celery.Task") if attr == "Task" else external("?") if attr == "conf" else None

    def _of_session(self, value: Value, attr: str, state: State, node: ast.AST) -> Value | None:
        return value.parts.get("engine") if attr == "bind" else external("?") if attr == "no_autoflush" else None

    def _of_async_engine(self, value: Value, attr: str, state: State, node: ast.AST) -> Value | None:
        return value if attr == "sync_engine" else None

    def _of_entity(self, value: Value, attr: str, state: State, node: ast.AST) -> Value | None:
        return Value("field", attr, node, parts={"of": value})

    def _of_field(self, value: Value, attr: str, state: State, node: ast.AST) -> Value | None:
        return Value("method", attr, node, parts={"of": value})


def flask_session(value: Value) -> Value:
    """Return the scoped Session of a Flask-SQLAlchemy."""
    engine = Value("engine", "flask", value.node, parts={"key": ("engine", value.node)})
    return Value("session", "proxy", value.node, parts={"key": ("flask", value.node), "engine": engine, "flask": True})


def _is_empty(value: Value | None) -> bool:
    return value is None or (value.kind == "constant" and literal(value) is None)


NONE = constant(None)
