"""Statements: the ways through a function, with what Sessions go through on each."""

from __future__ import annotations

import ast
from abc import abstractmethod
from typing import Any

from .blocks import Blocks
from .libraries import Libraries
from .names import NONE
from .project import Module
from .state import ClassState, Entry, Frame, State, join
from .values import UNKNOWN, Function, Value, bases_of

#: What keeps its attributes for each thread or greenlet.
_LOCALS = {"threading.local()", "gevent.local.local()", "eventlet.corolocal.local()"}


class Statements(Libraries):
    """The reading of definitions, assignments and branches."""

    typing: bool = False
    """In a branch that only type checkers import."""
    entry: Entry
    quiet: int
    stack: list[ast.AST]
    frames: list[Frame]
    steps: int
    async_uses: list[tuple[Value, ast.AST]]
    default_base: Value | None

    def block(self, body: list[ast.stmt], state: State | None) -> State | None:
        """Go through statements; None where none of the ways gets to their end."""
        for statement in body:
            if state is None or state.dead:
                return None
            self.steps += 1
            of_type: Any = getattr(self, f"_at_{type(statement).__name__.lower()}", None)
            if of_type is not None:
                state = of_type(statement, state)
            else:
                for child in ast.iter_child_nodes(statement):
                    if isinstance(child, ast.expr):
                        self.evaluate(child, state)
        return None if state is None or state.dead else state

    def run_module(self, module: Module) -> None:
        """Read a module from its first line to its last, as an import does."""
        saved = self.entry, self.quiet, self.stack, self.frames, self.steps
        self.entry, self.quiet, self.stack, self.frames, self.steps = Entry("import", module.name), 0, [], [], 0
        self.frames.append(Frame(module))
        self.imports.setdefault(module.name, set())
        state: State | None = State(self.envs[module.name])
        for statement in module.tree.body:
            going = self.block([statement], state)
            state = going or State(self.envs[module.name])
            self.envs[module.name] = state.env
        self.emit("imported", module.tree, state or State({}))
        self.entry, self.quiet, self.stack, self.frames, self.steps = saved

    # -- definitions ---------------------------------------------------------------------------------------------------

    def _at_functiondef(self, node: Function, state: State) -> State:
        inside = self.frame.function is not None
        outer = state.outer if isinstance(state, ClassState) else (state.env, *state.outer) if inside else ()
        flags = {"generator"} if _yields(node) else set()
        positional = [*node.args.posonlyargs, *node.args.args]
        given = [*zip(reversed(positional), reversed(node.args.defaults), strict=False)]
        given += [(one, value) for one, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if value]
        defaults = {one.arg: self.evaluate(value, state) for one, value in given}
        for name, value in defaults.items():
            if value.kind == "session":
                self.emit("assigned", node, state, value, name=name)
        parts = {"outer": outer, "flags": flags, "defaults": defaults}
        value = Value("function", node.name, node, self.frame.module, parts)
        self.functions[node] = value
        for decorator in reversed(node.decorator_list):
            if isinstance(decorator, ast.Attribute) and decorator.attr in {"setter", "deleter"}:
                return state
            call: Any = ast.copy_location(ast.Call(decorator, [], []), decorator)
            call.decorates = node
            made = self.called(self.evaluate(decorator, state), [value], {}, state, call)
            value = made if made.kind not in {"external", "constant"} else value
        if self.functions[node].kind == "function" and value.kind == "function" and value.node is node:
            self.functions[node] = value
        self.assign(ast.Name(node.name, ast.Store()), value, state, node)
        return state

    _at_asyncfunctiondef = _at_functiondef

    def _at_classdef(self, node: ast.ClassDef, state: State) -> State:
        parts: dict[str, Any] = {"bases": [self.evaluate(one, state) for one in node.bases]}
        parts["keywords"] = {one.arg: self.evaluate(one.value, state) for one in node.keywords}
        parts["kept"] = _kept(node)
        outer = (state.env, *state.outer) if self.frame.function is not None else ()
        inner = ClassState({}, outer, state.sessions)
        value = Value("class", node.name, node, self.frame.module, {**parts, "env": inner.env})
        self.classes[node] = value
        end = self.block(node.body, inner)
        value.parts["env"].update(end.env if end is not None else {})
        for name, member in value.parts["env"].items():
            if member.kind in {"session", "engine"}:
                self.emit("in-class", node, state, member, cls=value, name=name)
        state.env[node.name] = value
        return state

    def _at_import(self, node: ast.Import, state: State) -> State:
        for one in node.names:
            self._imports(one.name)
            name = one.name if one.asname else one.name.partition(".")[0]
            state.env[one.asname or name] = _imported(name, None)
        return state

    def _at_importfrom(self, node: ast.ImportFrom, state: State) -> State:
        name = self.frame.module.absolute(node.module, node.level)
        self._imports(name)
        for one in node.names:
            self._imports(f"{name}.{one.name}")
            module = self.project.find(name) if one.name == "*" else None
            if module is not None:
                state.env |= {key: value for key, value in self.env_of(module).items() if not key.startswith("_")}
            state.env[one.asname or one.name] = _imported(name, one.name)
        return state

    def _imports(self, name: str) -> None:
        """Note what a module imports when it is imported."""
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            module = self.project.find(".".join(parts[:count]))
            if module is None:
                continue
            if self.entry.kind == "import" and self.frame.function is None and not self.typing and not self.quiet:
                self.imports.setdefault(self.frame.module.name, set()).add(module.name)
                self.env_of(module)

    # -- assignments ---------------------------------------------------------------------------------------------------

    def _at_assign(self, node: ast.Assign, state: State) -> State:
        value = self.evaluate(node.value, state)
        for target in node.targets:
            self.assign(target, value, state, node)
        return state

    def _at_annassign(self, node: ast.AnnAssign, state: State) -> State:
        value = self.evaluate(node.value, state) if node.value is not None else UNKNOWN
        if value.name == "?" and self.frame.function is not None:
            value = self.annotated(node.annotation, state)
        if node.value is not None or isinstance(state, ClassState) or self.frame.function is not None:
            self.assign(node.target, value, state, node)
        return state

    def _at_augassign(self, node: ast.AugAssign, state: State) -> State:
        self.evaluate(node.value, state)
        owner = self.evaluate(node.target.value, state) if isinstance(node.target, ast.Attribute) else UNKNOWN
        if owner.kind == "entity":
            self.entity_written(owner, state, node)
        elif isinstance(node.target, ast.Name):
            self.assign(node.target, UNKNOWN, state, node)
        return state

    def assign(self, target: ast.expr, value: Value, state: State, node: ast.AST) -> None:
        """Let a target stand for a value."""
        if isinstance(target, ast.Name):
            if target.id in self.frame.globals:
                self.escape(value, state)
                self.emit("assigned", node, state, value, name=target.id)
                self.emit("kept", node, state, value, where=target.id)
            elif self.frame.function is None and not isinstance(state, ClassState):
                self.emit("assigned", node, state, value, name=target.id)
            state.env[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            known = value.kind == "list" and len(value.parts["items"]) == len(target.elts)
            for index, one in enumerate(target.elts):
                self.assign(one, value.parts["items"][index] if known else UNKNOWN, state, node)
        elif isinstance(target, ast.Starred):
            self.assign(target.value, UNKNOWN, state, node)
        elif isinstance(target, ast.Attribute):
            self._assign_attribute(self.evaluate(target.value, state), target, value, state, node)
        elif isinstance(target, ast.Subscript):
            self.evaluate(target.value, state)
            self.kept(target.value, [value], state, node)
            self.escape(value, state)

    def _assign_attribute(self, owner: Value, target: ast.Attribute, value: Value, state: State, node: ast.AST) -> None:
        if owner.kind == "entity":
            self.entity_written(owner, state, node)
        elif owner.kind == "instance" and self.on_task(owner):
            self.escape(value, state)
            self.emit("on-task", node, state, value, cls=owner.parts["cls"])
            self.emit("kept", node, state, value, where=f"{ast.unparse(target)}")
            owner.parts["fields"][target.attr] = value
        elif owner.kind == "instance":
            if value.kind == "session" and _is_of_a_thread(owner):
                self.emit("thread-local", node, state, value, owner=target.value, name=ast.unparse(target))
            owner.parts["fields"][target.attr] = value
            if owner.parts.get("made_in") is not self.entry:
                self.escape(value, state)
        else:
            if value.kind == "session" and _is_of_a_thread(owner):
                self.emit("thread-local", node, state, value, owner=target.value, name=ast.unparse(target))
            if owner.kind == "celery" and target.attr == "Task":
                self.default_base = value
            if owner.kind in {"class", "module"}:
                self.emit("assigned", node, state, value, name=ast.unparse(target))
                self.emit("kept", node, state, value, where=ast.unparse(target))
            self.escape(value, state)

    # -- ways ----------------------------------------------------------------------------------------------------------

    def _at_if(self, node: ast.If, state: State) -> State | None:
        known = self.truth(node.test, state)
        if isinstance(node.test, ast.Name | ast.Attribute) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            self.typing = True
            state = self.block(node.body, state) or state
            self.typing = False
            return self.block(node.orelse, state)
        self.evaluate(node.test, state)
        if known is not None:
            return self.block(node.body if known else node.orelse, state)
        other = state.copy()
        return join(self.block(node.body, state), self.block(node.orelse, other))

    def _at_match(self, node: ast.Match, state: State) -> State | None:
        self.evaluate(node.subject, state)
        return join(state, *(self.block(case.body, state.copy()) for case in node.cases))

    def _at_return(self, node: ast.Return, state: State) -> None:
        value = self.evaluate(node.value, state) if node.value is not None else NONE
        if not state.dead:
            self.frame.returns.append((state, value))

    def _at_raise(self, node: ast.Raise, state: State) -> None:
        self.evaluate(node.exc, state)
        self.frame.raised.add(state)

    def _at_break(self, node: ast.Break, state: State) -> None:
        self.frame.breaks.append(state)

    def _at_continue(self, node: ast.Continue, state: State) -> None:
        self.frame.continues.append(state)

    def _at_for(self, node: ast.For | ast.AsyncFor, state: State) -> State | None:
        over = self.evaluate(node.iter, state)
        if over.kind == "generator":
            return self.over_generator(over, node, state)
        if over.kind == "query":
            self.statement(over.parts["session"], state, node.iter, writes=False)
        return self._loop(node, state, lambda inside: self.assign(node.target, self.item_of(over), inside, node))

    _at_asyncfor = _at_for

    @abstractmethod
    def over_generator(self, generator: Value, node: ast.For | ast.AsyncFor, state: State) -> State | None:
        """Go through a loop over a generator of the project's."""

    def _at_while(self, node: ast.While, state: State) -> State | None:
        return self._loop(node, state, lambda inside: self.evaluate(node.test, inside))

    def _loop(self, node: Any, state: State, start: Any) -> State | None:
        """Go through a loop's body never, once and twice."""
        frame = self.frame
        saved = frame.breaks, frame.continues
        frame.breaks, ends = [], [state]
        endless = isinstance(node, ast.While) and self.truth(node.test, state) is True
        for _ in range(2):
            frame.continues = []
            inside = join(*ends)
            if inside is None:
                break
            start(inside)
            ends = [one for one in (*ends, join(self.block(node.body, inside), *frame.continues)) if one is not None]
        breaks, (frame.breaks, frame.continues) = frame.breaks, saved
        return join(None if endless else self.block(node.orelse, join(*ends)), *breaks)


class Walker(Blocks, Statements):
    """The reader of a project's code."""

    entry: Entry
    quiet: int
    stack: list[ast.AST]
    frames: list[Frame]
    steps: int
    async_uses: list[tuple[Value, ast.AST]]

    def run(self, entry: Entry, function: Value, owner: Value | None = None) -> None:
        """Go through a function that something else calls: Celery, a web framework, a command."""
        if function.module is None or function.kind != "function":
            return
        self.entry, self.stack, self.steps, self.async_uses = entry, [], 0, []
        self.frames = [Frame(function.module)]
        given = self.given(function, entry=True)
        if any(value.parts.get("injected") for value in given.values()):
            self.emit("injected", entry.node or ast.Pass(), State({}), entry.task)
        start = State({})
        inside = self.begin(function, [owner] if owner is not None else [], given, start, function.node or ast.Pass())
        assert inside is not None
        end = self.body_of(function, inside)
        frame = self.frame
        for state, value in frame.returns:
            self.escape(value, state)
        normal = join(end, *(state for state, _ in frame.returns))
        if normal is not None:
            if entry.commits and "ours" in normal.sessions:
                self.commit(normal.sessions["ours"].value, normal, entry.node or ast.Pass())
            self.emit("left", entry.node or ast.Pass(), normal, failed=False)
        if frame.raised.state is not None:
            self.emit("left", entry.node or ast.Pass(), frame.raised.state, failed=True)
        self.finish()
        self.leave(frame, end, start, function)


def _is_of_a_thread(owner: Value) -> bool:
    """Tell whether something is a `threading.local()`, or one of greenlets."""
    of_class = owner.parts.get("cls")
    names = [f"{one.name}()" for one in bases_of(of_class)] if of_class is not None else [owner.name]
    return any(name in _LOCALS for name in names)


def _yields(node: Function) -> bool:
    waiting: list[ast.AST] = list(node.body)
    while waiting:
        one = waiting.pop()
        if isinstance(one, ast.Yield | ast.YieldFrom):
            return True
        if not isinstance(one, (*Function.__args__, ast.Lambda, ast.ClassDef)):
            waiting.extend(ast.iter_child_nodes(one))
    return False


def _kept(node: ast.ClassDef) -> dict[str, list[tuple[Function, ast.expr]]]:
    """Return what methods of a class assign to attributes of their first parameter."""
    found: dict[str, list[tuple[Function, ast.expr]]] = {}
    for method in node.body:
        if not isinstance(method, Function) or not method.args.args:
            continue
        for one in ast.walk(method):
            targets = (
                one.targets if isinstance(one, ast.Assign) else [one.target] if isinstance(one, ast.AnnAssign) else []
            )
            for target in targets:
                value = getattr(one, "value", None)
                owner = getattr(target, "value", None)
                owners = {method.args.args[0].arg, node.name}
                if isinstance(target, ast.Attribute) and value is not None and getattr(owner, "id", "") in owners:
                    found.setdefault(target.attr, []).append((method, value))
    return found


def _imported(name: str, attr: str | None) -> Value:
    return Value("import", f"{name}:{attr}", parts={"module": name, "attr": attr})
