"""What a task, and the functions it gives its Session to, do with the Session. What is not known is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import libcst as cst

from .makers import Makers
from .source import (
    Imported,
    Module,
    Ref,
    RefusedError,
    block,
    code,
    is_name,
    local_imports,
    own,
    parents_of,
    walk,
)
from .tasks import Tasks, method

READS = {"query", "scalar", "scalars", "get", "get_one", "refresh", "expunge", "expunge_all", "expire", "expire_all"}
READS |= {"in_transaction", "in_nested_transaction", "get_bind", "connection", "is_modified", "exec", "bind_mapper"}
WRITES = {
    "add",
    "add_all",
    "delete",
    "delete_all",
    "merge",
    "flush",
    "execute",
    "begin_nested",
    "enable_relationship_loading",
}
WRITES |= {"bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"}
ENDINGS = {"commit", "rollback"}
ATTRIBUTES = {"new", "dirty", "deleted", "info", "is_active", "no_autoflush", "autoflush", "bind", "identity_map"}
HARMLESS_AFTER_COMMIT = {"refresh", "expunge", "expunge_all", "rollback"}
CLOSES = {"close", "remove", "reset", "invalidate", "close_all"}
READERS = ("pandas.read_sql", "sqlalchemy.inspect", "sqlalchemy.orm.object_session")
THREADS = ("concurrent.futures", "threading", "multiprocessing", "asyncio", "anyio", "asgiref", "gevent", "eventlet")

IsSession = Callable[[cst.CSTNode], bool]


@dataclass(eq=False)
class Scope:
    """A function in which a Session is looked for."""

    module: Module
    function: cst.FunctionDef
    is_session: IsSession
    known: set[cst.CSTNode] = field(default_factory=set)
    """Uses that are accounted for: where it is made, where it is closed."""
    cls: cst.ClassDef | None = None
    keeps: bool = False
    """`self.x = db` may stand here: a constructor."""
    helper: bool = True

    def __post_init__(self) -> None:
        self.parents: dict[cst.CSTNode, cst.CSTNode] = parents_of(self.function)
        self.local: Mapping[str, Imported] = local_imports(self.function, self.module)

    def uses(self) -> list[cst.CSTNode]:
        """Return the uses of the Session that are not accounted for."""
        inside = [node for part in (self.function.body, self.function.params) for node in walk(part)]
        return [node for node in inside if node not in self.known and self.is_session(node)]


class Uses:
    """Checks what is done with a Session."""

    def __init__(self, makers: Makers, tasks: Tasks, also: Callable[[Scope], None]) -> None:
        self._makers, self._tasks, self._also = makers, tasks, also
        self._seen: dict[tuple[object, str], RefusedError | None] = {}

    def check(self, scope: Scope) -> None:
        """Check every use of the Session in a function.

        Raises:
            RefusedError: one of them is not understood.
        """
        for use in scope.uses():
            self._check_use(scope, use)

    def _check_use(self, scope: Scope, use: cst.CSTNode) -> None:
        parent = scope.parents[use]
        if _in_inner_function(scope, use):
            raise RefusedError("its Session is used in a function inside it, which may run elsewhere", use)
        if isinstance(parent, cst.Attribute) and parent.value is use:
            self._check_attribute(scope, parent)
        elif isinstance(parent, cst.Arg):
            call = scope.parents[parent]
            if not isinstance(call, cst.Call):
                raise RefusedError("its Session is stored", use)
            self._check_argument(scope, call, parent)
        elif isinstance(parent, cst.Return | cst.Yield):
            raise RefusedError("its Session is returned", use)
        elif not _is_asked_for(scope, use) and not (scope.keeps and isinstance(parent, cst.Assign)):
            raise RefusedError(f"its Session is stored, or used in a way that is not known: {_short(parent)}", use)

    def _check_attribute(self, scope: Scope, attribute: cst.Attribute) -> None:
        name = attribute.attr.value
        above = scope.parents[attribute]
        if not isinstance(above, cst.Call) or above.func is not attribute:
            if name not in ATTRIBUTES:
                raise RefusedError(f"{code(attribute)} is used in a way that is not known", attribute)
            return
        if name in CLOSES:
            where = f"{scope.function.name.value}() closes" if scope.helper else "it closes"
            raise RefusedError(f"{where} its Session in the middle: {code(above)}", attribute)
        if name == "begin":
            raise RefusedError(f"{code(above)} begins a transaction by hand", attribute)
        if name not in READS | WRITES | ENDINGS:
            raise RefusedError(f"{code(attribute)}() is no method of Session that is known here", attribute)
        if name == "commit" and scope.helper:
            self._check_commits_last(scope, above)

    def _check_commits_last(self, scope: Scope, commit: cst.Call) -> None:
        """A function that is given the Session may commit as the last thing it does with it."""
        name = scope.function.name.value
        node: cst.CSTNode = commit
        while node is not scope.function:
            node = scope.parents[node]
            if isinstance(node, cst.For | cst.While):
                raise RefusedError(f"{name}(), which is given its Session, commits in a loop", commit)
        order = {one: number for number, one in enumerate(walk(scope.function))}
        for use in scope.uses():
            above = scope.parents[use]
            small = isinstance(above, cst.Attribute) and above.attr.value in HARMLESS_AFTER_COMMIT | CLOSES
            if order[use] > order[commit] + len(list(walk(commit))) and not small:
                raise RefusedError(f"{name}(), which is given its Session, commits and goes on", commit)

    # -- given to a function -------------------------------------------------------------------------------------------

    def _check_argument(self, scope: Scope, call: cst.Call, arg: cst.Arg) -> None:
        outside = self._makers.outside(scope.module, call.func, scope.local)
        only_looks = is_name(call.func, "isinstance", "type", "id", "repr", "str", "print", "bool", "hasattr")
        if only_looks or (outside is not None and outside.startswith(READERS)):
            return
        found = self.callee(scope, call.func)
        if found is None:
            raise RefusedError(f"its Session is given to {_short(call.func)}(), whose code is not found", call)
        module, target, cls = found
        if isinstance(target, cst.ClassDef):
            self._check_instance(scope, call, arg, module, target)
            return
        parameter = _parameter(target, call, arg, is_method=cls is not None and not _is_static(target))
        self.check_helper(module, target, parameter, cls)

    def check_helper(self, module: Module, function: cst.FunctionDef, name: str, cls: cst.ClassDef | None) -> None:
        """Check what a function does with the Session that it is given as its parameter `name`.

        Raises:
            RefusedError: something that is not understood, or that must not be.
        """
        if (function, name) not in self._seen:
            self._seen[function, name] = None  # for one that calls itself
            scope = Scope(module, function, lambda node: is_name(node, name), cls=cls)
            scope.known = not_uses(scope, name)
            try:
                self._check_plain(function)
                self._also(scope)
                self.check(scope)
            except RefusedError as error:
                self._seen[function, name] = error
        if (refused := self._seen[function, name]) is not None:
            raise RefusedError(refused.reason)

    def _check_plain(self, function: cst.FunctionDef) -> None:
        name = function.name.value
        if function.asynchronous is not None:
            raise RefusedError(f"its Session is given to the coroutine {name}()")
        if any(isinstance(node, cst.Yield) for node in own(function)):
            raise RefusedError(f"its Session is given to the generator {name}()")
        others = [one for one in function.decorators if not is_name(one.decorator, "staticmethod", "classmethod")]
        if others:
            raise RefusedError(f"its Session is given to {name}(), which is decorated")

    def callee(
        self, scope: Scope, func: cst.BaseExpression
    ) -> tuple[Module, cst.FunctionDef | cst.ClassDef, cst.ClassDef | None] | None:
        """Return the function or class of the project that is called, and the class whose method it is."""
        if isinstance(func, cst.Attribute):
            found = self._class_of(scope, func.value)
            if found is not None:
                return self.find_method(*found, func.attr.value)
        ref = self._makers.resolve(scope.module, func, scope.local)
        if ref is None or ref.module is None:
            return None
        value = ref.value
        if isinstance(value, cst.ClassDef) and len(ref.rest) == 1:
            return self.find_method(ref.module, value, ref.rest[0])
        if isinstance(value, cst.Call) and len(ref.rest) == 1:
            made = self._makers.resolve(ref.module, value.func)
            if made is not None and made.module is not None and isinstance(made.value, cst.ClassDef):
                return self.find_method(made.module, made.value, ref.rest[0])
        if isinstance(value, cst.FunctionDef | cst.ClassDef) and not ref.rest:
            return ref.module, value, None
        return None

    def _class_of(self, scope: Scope, node: cst.BaseExpression) -> tuple[Module, cst.ClassDef] | None:
        """Return the class of `X()`, of a variable that is given `X()` once, and of `self`."""
        if is_name(node, "self") and scope.cls is not None:
            return scope.module, scope.cls
        if isinstance(node, cst.Call) and is_name(node.func, "super") and scope.cls is not None:
            above = self._tasks.chain(scope.module, scope.cls)[1:]
            return above[0] if above else None
        if isinstance(node, cst.Name):
            values = [
                one.value
                for one in own(scope.function)
                if isinstance(one, cst.Assign) and any(is_name(target.target, node.value) for target in one.targets)
            ]
            if len(values) != 1:
                return None
            node = values[0]
        if isinstance(node, cst.Call):
            ref: Ref | None = self._makers.resolve(scope.module, node.func, scope.local)
            if ref is not None and ref.module is not None and isinstance(ref.value, cst.ClassDef) and not ref.rest:
                return ref.module, ref.value
        return None

    def find_method(
        self, module: Module, cls: cst.ClassDef, name: str
    ) -> tuple[Module, cst.FunctionDef, cst.ClassDef] | None:
        """Return the method of a class, or of one that it derives from, and the class that has it."""
        for one, node in self._tasks.chain(module, cls):
            if (found := method(node, name)) is not None:
                return one, found, node
        return None

    # -- kept by an object ---------------------------------------------------------------------------------------------

    def _check_instance(self, scope: Scope, call: cst.Call, arg: cst.Arg, module: Module, cls: cst.ClassDef) -> None:
        """`Repository(db)`: an object that lives no longer than the task may keep the Session."""
        above = scope.parents[call]
        if isinstance(above, cst.Assign) and all(isinstance(one.target, cst.Name) for one in above.targets):
            names = {code(one.target) for one in above.targets}
            for node in own(scope.function):
                if is_name(node, *names) and node not in {one.target for one in above.targets}:
                    parent = scope.parents[node]
                    if not isinstance(parent, cst.Attribute) or parent.attr is node:
                        raise RefusedError(f"{code(node)} keeps its Session, and is passed on", node)
        elif not isinstance(above, cst.Attribute):
            raise RefusedError(f"{cls.name.value}() keeps its Session, and is passed on", call)
        self._check_keeper(module, cls, call, arg)

    def _check_keeper(self, module: Module, cls: cst.ClassDef, call: cst.Call, arg: cst.Arg) -> None:
        found = self.find_method(module, cls, "__init__")
        if found is None:
            raise RefusedError(f"its Session is given to {cls.name.value}(), whose constructor is not found", call)
        module, constructor, owner = found
        name = _parameter(constructor, call, arg, is_method=True)
        scope = Scope(module, constructor, lambda node: is_name(node, name), cls=owner, keeps=True)
        scope.known = not_uses(scope, name)
        kept = set()
        for use in scope.uses():
            parent = scope.parents[use]
            for target in parent.targets if isinstance(parent, cst.Assign) else ():
                if not isinstance(target.target, cst.Attribute) or not is_name(target.target.value, "self"):
                    raise RefusedError(f"{cls.name.value}() stores its Session in {code(target.target)}")
                kept.add(target.target.attr.value)
        self.check(scope)
        for attribute in kept:
            for one, node in self._tasks.chain(module, cls):
                self._check_methods(one, node, attribute)

    def _check_methods(self, module: Module, cls: cst.ClassDef, attribute: str) -> None:
        def is_kept(node: cst.CSTNode) -> bool:
            return isinstance(node, cst.Attribute) and node.attr.value == attribute and is_name(node.value, "self")

        functions = [one for one in block(cls.body) if isinstance(one, cst.FunctionDef)]
        for function in functions:
            if function.name.value == "__init__" or not any(is_kept(node) for node in walk(function)):
                continue
            if function.asynchronous is not None:
                raise RefusedError(f"its Session is kept by {cls.name.value}, which has coroutines")
            scope = Scope(module, function, is_kept, cls=cls)
            self._also(scope)
            self.check(scope)

    # -- the task as a whole -------------------------------------------------------------------------------------------

    def check_threads(self, scope: Scope) -> None:
        """Refuse a task that starts threads, coroutines or processes.

        Raises:
            RefusedError: it does.
        """
        for node in own(scope.function):
            if isinstance(node, cst.Name | cst.Attribute):
                name = self._makers.outside(scope.module, node, scope.local) or ""
                if name.startswith(THREADS) and not name.endswith((".sleep", "Lock")):
                    raise RefusedError(f"it uses {name}: a Session must not be shared with what that starts", node)


def _parameter(function: cst.FunctionDef, call: cst.Call, arg: cst.Arg, *, is_method: bool) -> str:
    """Return the name of the parameter that an argument is passed for."""
    if arg.star or any(one.star for one in call.args[: call.args.index(arg)]):
        raise RefusedError("its Session is given among `*` arguments", call)
    if arg.keyword is not None:
        named = [*function.params.params, *function.params.kwonly_params]
        if all(one.name.value != arg.keyword.value for one in named):
            raise RefusedError(f"its Session is given to {function.name.value}() among `**` arguments", call)
        return arg.keyword.value
    positional = [*function.params.posonly_params, *function.params.params][1 if is_method else 0 :]
    index = call.args.index(arg)
    if index >= len(positional):
        raise RefusedError(f"its Session is given to {function.name.value}() among `*` arguments", call)
    return positional[index].name.value


def not_uses(scope: Scope, name: str) -> set[cst.CSTNode]:
    """Return the names that only look like uses of a parameter: itself, keywords, attributes of other things."""
    return {
        node
        for node in walk(scope.function)
        if is_name(node, name)
        and (
            isinstance(parent := scope.parents[node], cst.Param)
            or (isinstance(parent, cst.Arg) and parent.keyword is node)
            or (isinstance(parent, cst.Attribute) and parent.attr is node)
        )
    }


def _is_asked_for(scope: Scope, use: cst.CSTNode) -> bool:
    """Tell whether a task only asks whether it has a Session: `if db:`, `if db is not None:`."""
    parent = scope.parents[use]
    if isinstance(parent, cst.Comparison) and code(parent).endswith(" is not None"):
        use, parent = parent, scope.parents[parent]
    return not scope.helper and isinstance(parent, cst.If) and parent.test is use


def _is_static(function: cst.FunctionDef) -> bool:
    return any(is_name(one.decorator, "staticmethod") for one in function.decorators)


def _in_inner_function(scope: Scope, node: cst.CSTNode) -> bool:
    while node is not scope.function:
        node = scope.parents[node]
        if node is not scope.function and isinstance(node, cst.FunctionDef | cst.Lambda | cst.ClassDef):
            return True
    return False


def _short(node: cst.CSTNode) -> str:
    text = " ".join(code(node).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
