"""The tasks of the project in their other spelling: the same source, `async def`, each operation awaited.

The contract is one for both kinds of task, so there is one suite of tasks and tests. What is rewritten on import is
what a person would write otherwise: `await` before an operation of the Session, before a call of another task and
before a pause, `async with` for units of work and transactions, and `async def` for what has any of these in it.
"""

import ast
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType
from typing import Any

OPERATIONS = {
    *("execute", "scalars", "scalar", "get", "get_one", "flush", "commit", "rollback", "close", "refresh", "merge"),
    *("delete", "connection"),
}
NAMES = {"DatabaseTask": "AsyncDatabaseTask", "CurrentSession": "CurrentAsyncSession"}


def install(modules: Sequence[str]) -> None:
    """Let these modules be rewritten when they are imported."""
    sys.meta_path.insert(0, Finder(set(modules)))


class Finder:
    def __init__(self, modules: set[str]) -> None:
        self._modules = modules

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name not in self._modules:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        assert found is not None
        assert found.origin is not None
        return importlib.util.spec_from_file_location(name, found.origin, loader=Loader(name, found.origin))


class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        return compile(rewritten(self.get_data(self.path).decode(), self.path), self.path, "exec")


def rewritten(source: str, path: str = "") -> ast.Module:
    """Return the module in its other spelling."""
    tree = ast.parse(source, path)
    spelling = Spelling()
    known = -1
    while known != len(spelling.coroutines):  # a function that calls a coroutine is one too
        known = len(spelling.coroutines)
        tree = spelling.visit(ast.parse(source, path))
    return ast.fix_missing_locations(tree)


class Spelling(ast.NodeTransformer):
    def __init__(self) -> None:
        self.coroutines: set[str] = set()
        self._sessions: list[set[str]] = [set()]
        self._arguments: list[set[str]] = [set()]
        self._awaits = [False]
        self._plain = 0

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        for alias in node.names:
            if alias.name in NAMES:
                alias.name, alias.asname = NAMES[alias.name], alias.asname or alias.name
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        kind = kind_of(node)
        if kind == "plain":
            return node  # no task of ours
        self._awaits.append(kind == "task")
        names = {argument.arg for argument in node.args.args}
        self._sessions.append({*self._sessions[-1], *(names & {"session"})})
        self._arguments.append(names - {"self"})
        node.body = [self.visit(statement) for statement in node.body]
        self._sessions.pop()
        self._arguments.pop()
        if not self._awaits.pop() and node.name not in self.coroutines:
            return node
        self.coroutines.add(node.name)
        return InCoroutine().visit(ast.AsyncFunctionDef(**{name: getattr(node, name) for name in node._fields}))

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return node  # has no other spelling

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node

    def visit_With(self, node: ast.With) -> ast.AST:
        body = [self.visit(statement) for statement in node.body] if len(node.items) == 1 else node.body
        first, *rest = node.items
        if rest:
            inner = ast.copy_location(ast.With(items=rest, body=node.body), node)
            return ast.copy_location(ast.With(items=[self.visit(first)], body=[self.visit(inner)]), node)
        if not self._is_ours(first.context_expr):
            if self._is_session(first.context_expr):
                self._awaits[-1] = True
                self._sessions[-1].add(ast.unparse(first.optional_vars) if first.optional_vars else "")
                body = [self.visit(statement) for statement in ast.parse(ast.unparse(node)).body[0].body]  # type: ignore[attr-defined]
                return ast.copy_location(ast.AsyncWith(items=[first], body=body), node)
            return ast.copy_location(ast.With(items=[self.visit(first)], body=body), node)
        self._awaits[-1] = True
        if isinstance(first.optional_vars, ast.Name):
            self._sessions[-1].add(first.optional_vars.id)
            body = [self.visit(statement) for statement in ast.parse(ast.unparse(node)).body[0].body]  # type: ignore[attr-defined]
        call: Any = first.context_expr
        if call.func.attr == "unit_of_work":
            call.func.attr = "async_unit_of_work"
        return ast.copy_location(ast.AsyncWith(items=[first], body=body), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Name) and function.id in {*self.coroutines, "self"} - self._arguments[-1]:
            return self._awaited(node)
        if not isinstance(function, ast.Attribute):
            return node
        if function.attr in OPERATIONS and self._is_session(function.value):
            return self._awaited(node)
        name = ast.unparse(function)
        if name == "event.listen" and self._is_session(node.args[0]):
            node.args[0] = ast.Attribute(value=node.args[0], attr="sync_session", ctx=ast.Load())
        if name in {"tools.barrier", "tools.use"}:
            node.args.insert(0, function)
            node.func = ast.parse("__import__('asyncio').to_thread", mode="eval").body
            return self._awaited(node)
        if name == "time.sleep":
            node.func = ast.parse("__import__('asyncio').sleep", mode="eval").body
            return self._awaited(node)
        return node

    def _awaited(self, node: ast.Call) -> ast.AST:
        self._awaits[-1] = True
        return ast.copy_location(ast.Await(value=node), node)

    def _is_session(self, node: ast.expr) -> bool:
        return ast.unparse(node) in {"self.db", "task.db", "db.session", *self._sessions[-1]}

    def _is_ours(self, node: ast.expr) -> bool:
        """Tell whether a `with` is for a unit of work, or a transaction."""
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            return False
        if node.func.attr == "unit_of_work":
            return True
        return node.func.attr in {"begin", "begin_nested"} and self._is_session(node.func.value)


class InCoroutine(ast.NodeTransformer):
    """What is called otherwise in a coroutine."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "session" and ast.unparse(node.value) == "db":
            node.attr = "async_session"
        return node


def kind_of(node: ast.FunctionDef) -> str:
    """Return "task" for a DatabaseTask, "plain" for another task, "" for what is none."""
    for decorator in node.decorator_list:
        call = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = ast.unparse(call)
        if name == "task":
            return "task"
        if name == "app.task":
            has_base = isinstance(decorator, ast.Call) and any(one.arg == "base" for one in decorator.keywords)
            return "task" if has_base else "plain"
    return ""
