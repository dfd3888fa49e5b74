"""`with` and `try`: what happens at their ends, however they are left."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

from .libraries import Libraries
from .names import NONE
from .state import Frame, Raised, State, join
from .values import UNKNOWN, Value, bases_of, external

_DRIVERS = {"sqlalchemy", "psycopg", "psycopg2", "pymysql", "MySQLdb", "asyncpg", "sqlite3", "aiomysql"}
_NOT_OF_SERVER = {"NoResultFound", "MultipleResultsFound", "ArgumentError", "DetachedInstanceError", "StaleDataError"}
_TELLS = {"debug", "info", "warning", "error", "exception", "critical", "log", "print", "warn"}


class Blocks(Libraries):
    """The reading of `with` and `try`."""

    # -- with ----------------------------------------------------------------------------------------------------------

    def _at_with(self, node: ast.With | ast.AsyncWith, state: State) -> State | None:
        return self._with(node.items, node.body, state, node)

    _at_asyncwith = _at_with

    def _with(self, items: list[ast.withitem], body: list[ast.stmt], state: State, node: ast.AST) -> State | None:
        if not items:
            return self.block(body, state)
        item, rest = items[0], items[1:]
        value = self.evaluate(item.context_expr, state)
        if value.kind == "context" and value.name == "function":
            return self.through(value, item.optional_vars, rest, body, state, node)
        given = self.enter(value, state, item.context_expr)
        if item.optional_vars is not None:
            self.assign(item.optional_vars, given, state, node)
        frame = self.frame
        outer, frame.raised = frame.raised, Raised()
        marks = len(frame.returns), len(frame.breaks), len(frame.continues)
        after = self._with(rest, body, state, node)
        failed, frame.raised = frame.raised.state, outer
        leaving = [one for one, _ in frame.returns[marks[0] :]] + frame.breaks[marks[1] :] + frame.continues[marks[2] :]
        for one in ([after] if after is not None else []) + leaving:
            self.exit(value, one, item.context_expr, failed=False)
        if failed is not None:
            self.exit(value, failed, item.context_expr, failed=True)
            if value.kind == "external" and value.last == "suppress()":
                self._caught(value.parts["args"], failed, node, quiet=True)
                after = join(after, failed)
            frame.raised.add(failed)
        return None if after is None or after.dead else after

    def enter(self, value: Value, state: State, node: ast.AST) -> Value:
        """Return what `with value as ...` gives."""
        if value.kind == "context":
            if value.name == "function":
                return self.what_it_gives(value.parts["function"]) or UNKNOWN
            if value.name == "unit":
                state.change(value.parts["of"], unclosed=True)
            gives: Value = value.parts["gives"]
            return gives
        if value.kind == "instance":
            for name in ("__enter__", "__aenter__"):
                method = self.attribute(value, name, state, node)
                if method.kind == "bound":
                    return self.called(method, [], {}, state, ast.Call(ast.Name(name), [], []))
        return value

    def exit(self, value: Value, state: State, node: ast.AST, *, failed: bool) -> None:
        """Leave `with value`."""
        if value.is_session:
            self.close(value, state, node)
        elif value.kind == "instance":
            for name in ("__exit__", "__aexit__"):
                method = self.attribute(value, name, state, node)
                if method.kind == "bound":
                    args = [UNKNOWN if failed else NONE] * 3
                    self.called(method, args, {}, state, ast.Call(ast.Name(name), [], []))
                    state.dead = False
        elif value.kind == "context":
            self._exit_context(value, state, node, failed=failed)

    def _exit_context(self, value: Value, state: State, node: ast.AST, *, failed: bool) -> None:
        of: Value = value.parts["of"]
        if value.name in {"commit", "both", "unit"}:
            if failed:
                state.put(state.use(of).ended())
            else:
                outer, self.frame.raised = self.frame.raised, Raised()
                self.commit(of, state, node)
                raised, self.frame.raised = self.frame.raised.state, outer
                if raised is not None:
                    # SQLAlchemy rolls back what its context managers cannot commit.
                    raised.put(raised.use(of).ended())
                    raised.change(of, unclosed=raised.use(of).unclosed and value.name != "both")
                outer.add(raised)
            if value.name in {"both", "unit"} or of.kind == "connection":
                state.change(of, unclosed=False)
        elif value.name == "nested" and failed:
            state.change(of, risk=None)
        elif value.name == "closing":
            if of.is_session:
                self.close(of, state, node)
            elif of.kind == "instance":
                close = self.attribute(of, "close", state, node)
                self.called(close, [], {}, state, ast.Call(ast.Name("close"), [], []))
        elif value.name == "flask":
            for use in list(state.sessions.values()):
                if use.value.parts.get("flask"):
                    self.close(use.value, state, node)

    def through(
        self, value: Value, target: ast.expr | None, rest: list[Any], body: list[ast.stmt], state: State, node: ast.AST
    ) -> State | None:
        """Go through a block inside a context manager that is written as a generator."""
        frame = self.frame
        marks = len(frame.returns), len(frame.breaks), len(frame.continues)
        ends: list[State | None] = []

        def then(inside: State, given: Value) -> None:
            start = State(dict(state.env), state.outer, inside.sessions)
            if target is not None:
                self.assign(target, given, start, node)
            outer, frame.raised = frame.raised, Raised()
            end = self._with(rest, body, start, node)
            failed, frame.raised = frame.raised.state, outer
            if failed is not None:
                self.waiting[-1].raised.add(State(inside.env, inside.outer, failed.sessions))
            leaving = [one for one, _ in frame.returns[marks[0] :]] + frame.breaks[marks[1] :]
            together = join(end, *leaving, *frame.continues[marks[2] :])
            ends.append(end)
            if together is None:
                inside.dead = True
            else:
                inside.sessions = together.sessions

        parts = value.parts
        self.run_generator(parts["function"], parts["args"], parts["keywords"], state, node=node, then=then)
        if not ends:
            return self._with(rest, body, state, node)
        for one in (
            [one for one, _ in frame.returns[marks[0] :]] + frame.breaks[marks[1] :] + frame.continues[marks[2] :]
        ):
            one.sessions = dict(state.sessions)
        end = join(*ends)
        if end is not None:
            end.sessions = dict(state.sessions)
        return end

    def over_generator(self, generator: Value, node: ast.For | ast.AsyncFor, state: State) -> State | None:
        """Go through a loop over a generator of the project's."""
        return self.through(generator, node.target, [], node.body, state, node)

    # -- generators ----------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> list[Frame]:
        """The generators that wait at a `yield`, the innermost last."""
        found: list[Frame] = self.__dict__.setdefault("_waiting", [])
        return found

    def run_generator(
        self, function: Value, args: list[Value], keywords: dict[str, Value], state: State, *, node: Any, then: Any
    ) -> None:
        """Go through a generator, and at each `yield` through `then(its state, what it yields)`."""
        inside = self.begin(function, args, keywords, state, node)
        if inside is None:
            return
        self.frame.yields = then
        try:
            end = self.body_of(function, inside)
            frame = self.frame
        finally:
            self.finish()
        self.leave(frame, end, state, function)

    def yielded(self, value: Value, state: State, node: ast.AST) -> Value:
        """Go on where a generator's caller does."""
        frame = self.frame
        if frame.yields is None:
            self.escape(value, state)
            self.frame.raised.add(state)
            return UNKNOWN
        self.waiting.append(self.frames.pop())
        call = self.stack.pop()
        try:
            frame.yields(state, value)
        finally:
            self.stack.append(call)
            self.frames.append(self.waiting.pop())
        return UNKNOWN

    # -- try -----------------------------------------------------------------------------------------------------------

    def _at_try(self, node: ast.Try, state: State) -> State | None:
        frame = self.frame
        marks = len(frame.returns), len(frame.breaks), len(frame.continues)
        for key, use in list(state.sessions.items()):
            if use.risk is not None:
                state.sessions[key] = replace(use, risk=None)
        before = state.copy()
        outer, frame.raised = frame.raised, Raised()
        after = self.block(node.body, state)
        failed, frame.raised = frame.raised.state, Raised()
        after = self.block(node.orelse, after)
        ends = [after]
        everything = False
        for handler in node.handlers:
            kinds = self._kinds(handler.type, before)
            everything = everything or any(one.name in {"", "Exception", "BaseException"} for one in kinds)
            inside = (failed or before).copy()
            if handler.name:
                inside.env[handler.name] = UNKNOWN
            self._caught(kinds, inside, handler, quiet=_is_quiet(handler))
            ends.append(self.block(handler.body, inside))
        if not everything:
            frame.raised.add(failed)
        end, raised, frame.raised = join(*ends), frame.raised.state, outer
        if not node.finalbody:
            frame.raised.add(raised)
            return end
        for index in range(marks[0], len(frame.returns)):
            left, value = frame.returns[index]
            frame.returns[index] = (self.block(node.finalbody, left) or left, value)
        for states, mark in ((frame.breaks, marks[1]), (frame.continues, marks[2])):
            states[mark:] = [self.block(node.finalbody, one) or one for one in states[mark:]]
        frame.raised.add(self.block(node.finalbody, raised))
        return self.block(node.finalbody, end)

    _at_trystar = _at_try

    def _kinds(self, node: ast.expr | None, state: State) -> list[Value]:
        if node is None:
            return [external("")]
        value = self.evaluate(node, state.copy())
        found: list[Value] = value.parts["items"] if value.kind == "list" else [value]
        return found

    def _caught(self, kinds: list[Value], state: State, node: ast.AST, *, quiet: bool) -> None:
        """Let Sessions be broken whose error was caught."""
        if not any(_is_database_error(kind) for kind in kinds):
            return
        for use in list(state.sessions.values()):
            if use.risk is not None and not use.value.parts.get("autocommit"):
                state.change(use.value, broken=(self.frame.module, node), quiet=quiet, risk=None)


def _is_database_error(kind: Value) -> bool:
    names = [one for one in bases_of(kind) if one.kind == "external"]
    return any(
        one.name in {"", "Exception", "BaseException"} or (one.root in _DRIVERS and one.last not in _NOT_OF_SERVER)
        for one in (names if kind.kind == "external" else names[:0])
    )


def _is_quiet(handler: ast.ExceptHandler) -> bool:
    """Tell whether a handler of every error says nothing to its caller: it passes, or writes to a log."""
    broad = handler.type is None or ast.unparse(handler.type) in {"Exception", "BaseException", "SQLAlchemyError"}
    return broad and all(
        isinstance(one, ast.Pass | ast.Continue)
        or (
            isinstance(one, ast.Expr)
            and isinstance(one.value, ast.Call)
            and isinstance(one.value.func, ast.Attribute | ast.Name)
            and getattr(one.value.func, "attr", getattr(one.value.func, "id", "")) in _TELLS
        )
        for one in handler.body
    )
