"""Calls: of the project's functions, which are gone through, and of libraries' names, which are known or not."""

from __future__ import annotations

import ast
from abc import abstractmethod
from typing import Any

from .databases import CLOSES
from .functions import Functions
from .state import State
from .values import (
    UNKNOWN,
    Value,
    constant,
    external,
    is_task_class,
    literal,
    made_by,
)

#: Calls that do not fail, as far as a Session that is open is concerned.
_HARMLESS = {"info", "debug", "warning", "error", "exception", "critical", "log", "print", "isinstance", "getattr"}
USES_ENGINE = {"create_all", "drop_all", "reflect", "inspect", "read_sql", "read_sql_query", "read_sql_table"}
USES_ENGINE |= {"to_sql", "Table", "prepare", "create", "drop", "create_database", "database_exists"}
SENDS = {"delay", "apply_async", "send_task"}
_SIGNATURES = {"s", "si", "signature", "subtask", "chunks", "map", "starmap", "set", "link", "clone", "on_error"}
ON_COMMIT = ("delay_on_commit", "apply_async_on_commit")


class Calls(Functions):
    """The evaluation of calls."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tasks: dict[ast.AST, Value] = {}
        self.handlers: list[tuple[str, Value]] = []
        """Of signals: the signal's name, and the function."""

    @abstractmethod
    def library(
        self, target: Value, args: list[Value], keywords: dict[str, Value], state: State, node: ast.Call
    ) -> Value:
        """Go through a call of a library's name."""

    @abstractmethod
    def own_loop(self, target: Value, state: State, node: ast.Call) -> None:
        """Tell of a coroutine that runs in an event loop of its own, and uses an Engine of the process."""

    def call(self, node: ast.Call, state: State) -> Value:
        """Go through a call, and return what it returns."""
        target = self.evaluate(node.func, state)
        args: list[Value] = []
        for one in node.args:
            value = self.evaluate(one, state)
            known = isinstance(one, ast.Starred) and value.kind == "list" and value.name == ""
            args += value.parts["items"] if known else [value]
        keywords = {one.arg or "**": self.evaluate(one.value, state) for one in node.keywords}
        if state.dead:
            return UNKNOWN
        found = self.called(target, args, keywords, state, node)
        if target.kind == "external":
            self.own_loop(target, state, node)
            if target.last not in _HARMLESS and "." in target.name and not made_by(target):
                self.frame.raised.add(state)
        return found

    def called(
        self, target: Value, args: list[Value], keywords: dict[str, Value], state: State, node: ast.Call
    ) -> Value:
        """Return what a call of `target` returns."""
        if target.kind == "function":
            return self.call_function(target, args, keywords, state, node)
        if target.kind == "bound":
            return self.call_function(target.parts["function"], [target.parts["self"], *args], keywords, state, node)
        if target.kind == "partial":
            function, given = target.parts["function"], target.parts["args"]
            return self.called(function, [*given, *args], {**target.parts["keywords"], **keywords}, state, node)
        if target.kind == "class":
            return self.instantiate(target, args, keywords, state, node)
        if target.kind == "maker":
            return self.make_session(target, keywords, state, node)
        if target.kind == "scoped":
            parts = {"key": target.key, "engine": target.parts.get("engine"), "scoped": target}
            parts["entry"] = self.entry.kind
            return Value("session", "of scoped", node, parts=parts)
        if target.kind == "session" and target.name == "proxy":
            return target
        if target.kind == "task":
            given = [self.self_of(target), *args] if target.parts.get("bind") else args
            return self.call_function(target.parts["function"], given, keywords, state, node)
        if target.kind == "signature":
            self.emit("send", node, state, target, args=[*args, *keywords.values()])
            return UNKNOWN
        if target.kind == "method":
            return self.method(target.parts["of"], target.name, args, keywords, state, node)
        if target.kind == "instance":
            called = self.attribute(target, "__call__", state, node)
            return self.called(called, args, keywords, state, node) if called.kind == "bound" else UNKNOWN
        return self.library(target, args, keywords, state, node) if target.kind == "external" else UNKNOWN

    # -- methods of what is known --------------------------------------------------------------------------------------

    def method(
        self, of: Value, name: str, args: list[Value], keywords: dict[str, Value], state: State, node: ast.Call
    ) -> Value:
        """Go through a method of something that is known."""
        if of.kind in {"session", "connection"} or (of.kind == "scoped" and name != "configure"):
            for other in of.parts.get("also", ()) if name in CLOSES | {"rollback"} else ():
                self.on_session(other, name, args, keywords, state, node)
            return self.on_session(of, name, args, keywords, state, node)
        if of.kind in {"engine", "async_engine"}:
            return self.on_engine(of, name, keywords, state, node)
        if of.kind == "maker":
            return self.on_maker(of, name, state, node)
        if of.kind in {"query", "entities"}:
            return self.on_query(of, name, args, keywords, state, node)
        if of.kind == "field":
            return self.on_field(of, name, state, node)
        if of.kind == "flask_db":
            if name in {"create_all", "drop_all", "reflect"}:
                self.engine_used(self._of_flask_db(of, "engine", state, node) or UNKNOWN, state, node)
            return UNKNOWN
        if of.kind in {"task", "signature"}:
            return self._task_method(of, name, args, keywords, state, node)
        if of.kind == "alchemy":
            return self._alchemy_method(of, name, args, keywords, state, node)
        if of.kind == "celery":
            return self._celery_method(of, name, args, keywords, state, node)
        if of.kind == "context" and of.name == "commit" and name in {"commit", "rollback", "close"}:
            return self.on_session(of.parts["of"], "rollback" if name == "close" else name, [], {}, state, node)
        if of.kind == "context" and of.name == "nested" and name in {"rollback", "close"}:
            state.change(of.parts["of"], risk=None, broken=None, quiet=False)
        if of.kind == "generator" and name in {"__next__", "__anext__"} and isinstance(node.func, ast.Attribute):
            return self.taken(of, state, node, kept=not isinstance(node.func.value, ast.Call))
        if of.kind == "context" and of.name == "flask" and name == "push":
            self.emit("pushed", node, state, of)
        for one in (*args, *keywords.values()):
            if one.kind.endswith("engine") and name in USES_ENGINE:
                self.engine_used(one, state, node)
        if of.kind == "method":
            self.emit("library", node, state, external(f"?.{of.name}.{name}"), args=args)
        if of.kind in {"list", "constant"} and name in {"append", "add", "setdefault", "insert", "update"}:
            self.kept(node.func.value if isinstance(node.func, ast.Attribute) else None, args, state, node)
        return UNKNOWN

    def taken(self, generator: Value, state: State, node: ast.Call, *, kept: bool) -> Value:
        """Return what a generator yields first.

        Args:
            kept: It has a name, and so lives on. Without one Python closes it at once.
        """
        given: list[Value] = []

        def then(inside: State, value: Value) -> None:
            given.append(value)
            state.sessions = dict(inside.sessions)

        parts = generator.parts
        self.run_generator(parts["function"], parts["args"], parts["keywords"], state, node=node, then=then)
        value = given[0] if given else UNKNOWN
        if value.is_session:
            state.change(value, unclosed=False, escaped=kept, made=None)
            if not kept:
                self.emit("generator", node, state, value)
        return value

    def on_task(self, owner: Value) -> bool:
        """Tell whether an object is a Task."""
        return "task" in owner.parts or is_task_class(owner.parts["cls"])

    def kept(self, container: ast.expr | None, values: list[Value], state: State, node: ast.AST) -> None:
        """Tell of objects that are put into something of the module's."""
        if isinstance(container, ast.Attribute):
            owner = self.evaluate(container.value, state)
            if owner.kind != "class" and not (owner.kind == "instance" and self.on_task(owner)):
                return
        elif not isinstance(container, ast.Name) or any(container.id in env for env in (state.env, *state.outer)):
            return
        for value in values:
            self.escape(value, state)
            if value.kind in {"entity", "entities", "session"}:
                self.emit("kept", node, state, value, where=ast.unparse(container), container=True)

    def _task_method(
        self, task: Value, name: str, args: list[Value], keywords: dict[str, Value], state: State, node: ast.Call
    ) -> Value:
        if name in SENDS:
            self.emit("send", node, state, task, args=[*args, *keywords.values()], keywords=keywords)
        elif name in ON_COMMIT:
            base = task.parts.get("base")
            if task.kind == "task" and task.parts.get("bare") and base is None:
                self.emit("no-base", node, state, task, attr=name)
            self.emit("on-commit", node, state, task, args=[*args, *keywords.values()], keywords=keywords)
        elif name in _SIGNATURES:
            return Value("signature", task.name, node, parts={**task.parts, "args": [*args, *keywords.values()]})
        elif name == "retry" and task.kind == "task":
            self.frame.raised.add(state)
            state.dead = True
        elif name in {"run", "__call__"} and task.kind == "task" and "function" in task.parts:
            return self.called(task, args, keywords, state, node)
        return UNKNOWN

    def _alchemy_method(
        self, of: Value, name: str, args: list[Value], keywords: dict[str, Value], state: State, node: ast.Call
    ) -> Value:
        if name in {"unit_of_work", "async_unit_of_work"}:
            session = Value("session", "ours", node, parts={"key": self.key_of(node)})
            return Value("context", "unit", node, parts={"of": session, "gives": session})
        if name == "task":
            options = {"base": external("celery_alchemy.DatabaseTask"), **keywords}
            return self._task_decorator(external("celery.task", options=options), args, options, state, node)
        if name in (*ON_COMMIT, "on_commit"):
            self.emit("on-commit", node, state, of, args=[], keywords=keywords)
        if name in {"share", "follow"}:
            self.emit(name, node, state, args[0] if args else None)
        return external("?")

    def _celery_method(
        self, of: Value, name: str, args: list[Value], keywords: dict[str, Value], state: State, node: ast.Call
    ) -> Value:
        if name == "send_task":
            self.emit("send", node, state, of, args=[*args, *keywords.values()], keywords=keywords)
        elif name == "task":
            return self._task_decorator(external("celery.task", app=of), args, keywords, state, node)
        elif name == "register_task" and args and args[0].kind == "instance":
            cls = args[0].parts["cls"]
            return Value("task", cls.name, cls.node, cls.module, {"base": cls, "options": {}, "class_based": True})
        elif name in {"signature"}:
            return Value("signature", node=node)
        return UNKNOWN

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def _task_decorator(
        self, target: Value, args: list[Value], keywords: dict[str, Value], state: State, node: ast.Call
    ) -> Value:
        if args and args[0].kind in {"function", "partial"} and len(args) == 1:
            return self.make_task(args[0], target.parts.get("options", {}), target.parts.get("app"), state, node)
        return external("celery.task()", app=target.parts.get("app"), options={**keywords, "_node": constant(node)})

    def make_task(
        self, function: Value, options: dict[str, Value], app: Value | None, state: State, node: ast.AST
    ) -> Value:
        """Return the task that a decorator makes of a function."""
        parts: dict[str, Any] = {"function": function, "options": options, "app": app}
        parts["bind"] = literal(options.get("bind")) is True
        declared = getattr(node, "decorates", None) or function.node or node
        task = Value("task", getattr(declared, "name", function.name), declared, function.module, parts)
        self.tasks[declared] = task
        self.settle(task)
        self.emit("task", declared, state, task)
        return task

    def settle(self, task: Value) -> None:
        """Say which class a task has, as far as it is known by now."""
        options, app = task.parts["options"], task.parts["app"]
        base = options.get("base") or self.base_of(app)
        bare = base is None or (base.kind == "external" and base.name in {"celery.Task", "celery.app.task.Task"})
        task.parts["base"] = base
        task.parts["bare"] = bare and "**" not in options and (app is None or app.kind == "celery")

    def base_of(self, app: Value | None) -> Value | None:
        """Return the class of an app's tasks; without an app, that of any app of the project."""
        if app is None:
            return next((base for one in self.apps if (base := self.base_of(one)) is not None), self.default_base)
        named = app.parts.get("task_cls")
        if named is None and app.parts.get("cls") is not None:
            named = app.parts["cls"].parts["env"].get("task_cls")
        if named is not None:
            text = literal(named)
            return external(str(text).replace(":", ".")) if isinstance(text, str) else self.resolve(named)
        return self.default_base
