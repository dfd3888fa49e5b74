"""The project's functions and classes: a call goes through them, with what their parameters stand for."""

from __future__ import annotations

import ast
from abc import abstractmethod

from .databases import Databases
from .state import Frame, State, join
from .values import UNKNOWN, Function, Value, bases_of, external, is_mapped, is_task_class

DEPTH = 6
"""Frames: the module, the task, and five calls below it."""
STEPS = 5_000
"""Statements that are gone through for one task; then calls are left alone."""


class Functions(Databases):
    """The going through functions."""

    def call_function(
        self, function: Value, args: list[Value], keywords: dict[str, Value], state: State, node: ast.Call
    ) -> Value:
        flags = function.parts["flags"]
        if flags & {"generator", "context"}:
            kind = "context" if "context" in flags else "generator"
            parts = {"function": function, "args": args, "keywords": keywords}
            return Value(kind, "function", node, parts=parts)
        return self.inline(function, args, keywords, state, node)

    def inline(
        self, function: Value, args: list[Value], keywords: dict[str, Value], state: State, node: ast.AST
    ) -> Value:
        """Go through a function as a call does."""
        inside = self.begin(function, args, keywords, state, node)
        if inside is None:
            return UNKNOWN
        try:
            end = self.body_of(function, inside)
            frame = self.frame
        finally:
            self.finish()
        found = self.leave(frame, end, state, function)
        self._hand_over(found, function, state, node)
        return found

    def _hand_over(self, found: Value, function: Value, state: State, node: ast.AST) -> None:
        """Let a Session that a function has made and returned be made where the function is called: that code is to
        close it."""
        use = state.sessions.get(found.key) if found.is_session else None
        if use is None or use.made is None or self.frame.function is None or not _is_in(use.made, function):
            return
        state.change(found, made=(self.frame.module, node))

    def leave(self, frame: Frame, end: State | None, state: State, function: Value) -> Value:
        """Let the caller's state have what happened in a function, and return what it returns."""
        if frame.raised.state is not None:
            self.frame.raised.add(State(state.env, state.outer, frame.raised.state.sessions))
        together = join(end, *(one for one, _ in frame.returns))
        if together is None:
            state.dead = True
            return UNKNOWN
        state.sessions = together.sessions
        values = [value for _, value in frame.returns if value is not None]
        telling = [value for value in values if value.kind != "constant" and value.name != "?"]
        found = telling[0] if telling else values[0] if len(values) == 1 and end is None else UNKNOWN
        if "cached" in function.parts["flags"] and found.kind in {"entity", "entities", "session"}:
            self.escape(found, state)
            self.emit("kept", function.node or ast.Pass(), state, found, where="cache", module=function.module)
        if "kept" in function.parts["flags"] and found.is_session:
            self.escape(found, state)
            owners = [one for one in self.classes.values() if one.parts["env"].get(function.name) is function]
            if owners and is_task_class(owners[0]):
                self.emit("on-task", found.node or ast.Pass(), state, found, cls=owners[0])
        return found

    def begin(
        self, function: Value, args: list[Value], keywords: dict[str, Value], state: State, node: ast.AST
    ) -> State | None:
        """Enter a function; None where it is not gone through: too deep, or it calls itself."""
        inside = any(frame.function is not None and frame.function.node is function.node for frame in self.frames)
        if inside or function.module is None:
            return None
        if len(self.frames) > DEPTH or self.steps > STEPS:
            why = f"{STEPS:,} statements" if self.steps > STEPS else f"{DEPTH - 1} calls, one in the other"
            self.emit("left-out", node, state, function, why=why, module=self.frames[0].module)
            return None
        if self.entry.kind in {"task", "late", "hook"} and not self.entry.signal and function.node is not None:
            self.reached.add(function.node)
        env = self.bind(function, args, {**self.given(function), **keywords})
        self.frames.append(Frame(function.module, function))
        self.stack.append(node)
        return State(env, function.parts["outer"], state.sessions)

    def finish(self) -> None:
        """Leave a function."""
        self.frames.pop()
        self.stack.pop()

    def body_of(self, function: Value, state: State) -> State | None:
        """Go through the body of a function."""
        if isinstance(function.node, ast.Lambda):
            self.frame.returns.append((state, self.evaluate(function.node.body, state)))
            return None
        assert isinstance(function.node, Function)
        if "globals" not in function.parts:
            found = (one.names for one in ast.walk(function.node) if isinstance(one, ast.Global))
            function.parts["globals"] = {name for names in found for name in names}
        self.frame.globals = function.parts["globals"]
        return self.block(function.node.body, state)

    @abstractmethod
    def block(self, body: list[ast.stmt], state: State | None) -> State | None:
        """Go through statements; None where none of the ways gets to their end."""

    def given(self, function: Value, *, entry: bool = False) -> dict[str, Value]:
        """Return what is known of a function's parameters without a call: by annotation, or by Depends(...).

        Args:
            entry: Nothing of the project calls it: an annotation tells more than a default.
        """
        if "annotated" not in function.parts:
            function.parts["annotated"] = {}
            arguments = function.node.args  # type: ignore[union-attr]
            assert function.module is not None
            with self.silently(function.module) as state:
                state.outer = function.parts["outer"]
                for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                    default = function.parts.get("defaults", {}).get(one.arg)
                    found = self.annotated(one.annotation, state)
                    if default is not None and default.last == "Depends()" and default.parts["args"]:
                        found = self.what_it_gives(default.parts["args"][0]) or found
                    if found is not UNKNOWN:
                        function.parts["annotated"][one.arg] = found
        known: dict[str, Value] = function.parts["annotated"]
        defaults = function.parts.get("defaults", {})
        return {name: value for name, value in known.items() if entry or not _is_plain(defaults.get(name))}

    @staticmethod
    def bind(function: Value, args: list[Value], keywords: dict[str, Value]) -> dict[str, Value]:
        """Return what a function's parameters stand for in a call."""
        arguments = function.node.args  # type: ignore[union-attr]
        positional = [*arguments.posonlyargs, *arguments.args]
        env = dict(function.parts.get("defaults", {}))
        names = {one.arg for one in (*positional, *arguments.kwonlyargs)}
        env |= {name: value for name, value in keywords.items() if name in names}
        env |= {one.arg: value for one, value in zip(positional, args, strict=False) if value is not UNKNOWN}
        for name in names:
            env.setdefault(name, UNKNOWN)
        if arguments.vararg is not None:
            env[arguments.vararg.arg] = Value("list", parts={"items": args[len(positional) :]})
        if arguments.kwarg is not None:
            rest = {name: value for name, value in keywords.items() if name not in names}
            parts = {"items": list(rest.values()), "keys": list(rest)}
            env[arguments.kwarg.arg] = Value("list", "dict", parts=parts)
        return env

    def instantiate(
        self, cls: Value, args: list[Value], keywords: dict[str, Value], state: State, node: ast.Call
    ) -> Value:
        """Return a new object of a class of the project."""
        if is_mapped(cls):
            return Value("entity", "new", node, parts={"cls": cls})
        special = self.special_base(cls)
        if special == "session":
            engine = next((one for one in (*args, *keywords.values()) if one.kind.endswith("engine")), None)
            return self.make("session", engine, state, node, maker=cls.node, cls=cls)
        if special:
            made = Value(special, node=node, module=self.frame.module, parts={"cls": cls, "key": node, **keywords})
            self.apps.extend([made] if special == "celery" else [])
            self.emit("made", node, state, made)
            return made
        fields: dict[str, Value] = {}
        made = Value("instance", node=node, module=cls.module, parts={"cls": cls, "fields": fields, "key": node})
        made.parts["made_in"] = self.entry
        if is_task_class(cls):
            return made
        handed = [one for one in (*args, *keywords.values()) if one.kind == "session" and one.name != "proxy"]
        for base in bases_of(cls):
            if handed and base.name in {"threading.Thread", "multiprocessing.Process"}:
                self.emit("spawn", node, state, handed[0], what=base.name)
        start = self._member(made, cls, "__init__", state, node)
        if start is not None and start.kind == "bound":
            self.inline(start.parts["function"], [made, *args], keywords, state, node)
        else:
            fields |= {name: value for name, value in keywords.items() if name != "**"}
            names = [name for name, value in cls.parts["env"].items() if value.name == "?"]
            fields |= dict(zip(names, args, strict=False))
        return made

    def self_of(self, task: Value) -> Value:
        """Return what `self` is in a bound task."""
        base = task.parts.get("base") or external("celery.Task")
        bare = task.parts.get("bare", False)
        return Value("instance", task.name, task.node, parts={"cls": base, "fields": {}, "bare": bare, "task": task})


def _is_in(place: tuple[object, ast.AST], function: Value) -> bool:
    """Tell whether a place is in the body of a function."""
    module, node = place
    line = getattr(node, "lineno", 0)
    return (
        module is function.module
        and function.node is not None
        and (getattr(function.node, "lineno", 0) <= line <= getattr(function.node, "end_lineno", 0))
    )


def _is_plain(value: Value | None) -> bool:
    """Tell whether a default is a value of its own."""
    return value is not None and value.last != "Depends()"
