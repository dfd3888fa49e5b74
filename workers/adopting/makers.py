"""How a project makes its Sessions: Engines, sessionmakers, scoped_sessions, and functions around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import libcst as cst

from .source import (
    Imported,
    Module,
    Project,
    Ref,
    argument,
    block,
    called,
    code,
    dotted,
    expression,
    is_name,
    own,
    walk,
)

ENGINES = {"sqlalchemy.create_engine", "sqlalchemy.engine.create_engine", "sqlmodel.create_engine"}
MAKERS = {"sqlalchemy.orm.sessionmaker", "sqlalchemy.orm.session.sessionmaker"}
SCOPED = {"sqlalchemy.orm.scoped_session", "sqlalchemy.orm.scoping.scoped_session"}
SESSIONS = {"sqlalchemy.orm.Session", "sqlalchemy.orm.session.Session", "sqlmodel.Session"}
CONTEXT_MANAGERS = {"contextlib.contextmanager"}
CLOSING = {"contextlib.closing"}
Local = Mapping[str, Imported]


@dataclass(frozen=True, slots=True)
class Source:
    """Where Sessions come from."""

    engine: Ref
    """The Engine, by its name in a module."""
    maker: Ref | None = None
    """The sessionmaker or scoped_session; None: `Session(engine)`."""
    scoped: bool = False
    session_class: str = "sqlalchemy.orm.Session"
    options: tuple[tuple[str, str], ...] = ()
    """Keyword arguments of Session, as code."""
    commits: bool = False
    """The end of the `with` block commits."""
    is_block: bool = False
    """It is used by `with` alone."""
    through: tuple[Ref, ...] = ()
    """The functions between."""

    @property
    def is_plain(self) -> bool:
        """Whether its options can be written elsewhere: SQLAlchemy's class, and values without names."""
        known = self.session_class in {"sqlalchemy.orm.Session", "sqlmodel.Session"}
        nodes = (node for _, value in self.options for node in walk(cst.parse_expression(value)))
        return known and all(is_constant(node) for node in nodes if isinstance(node, cst.Name))

    @property
    def database(self) -> tuple[object, ...]:
        """What tells two databases, or two kinds of Session, apart."""
        options = tuple(sorted(pair for pair in self.options if pair != ("autocommit", "False")))
        return (self.engine.module, self.engine.name, self.session_class, options)


class Makers:
    """Finds out what makes a Session."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._busy: set[object] = set()

    def resolve(self, module: Module, node: cst.CSTNode | None, local: Local | None = None) -> Ref | None:
        """Return what a name or dotted name stands for."""
        name = dotted(node)
        return None if name is None else self._project.resolve(module, name.split("."), local)

    def outside(self, module: Module, node: cst.CSTNode | None, local: Local | None = None) -> str | None:
        """Return the full name of something that comes from another package."""
        ref = self.resolve(module, node, local)
        return ref.name if ref is not None and ref.module is None else None

    def engine(self, module: Module, node: cst.CSTNode | None, local: Local | None = None) -> Ref | None:
        """Return the Engine that a name stands for."""
        ref = self.resolve(module, node, local)
        if ref is None or ref.module is None or ref.rest:
            return None
        value = ref.value
        is_engine = isinstance(value, cst.Call) and self.outside(ref.module, value.func) in ENGINES
        return ref if is_engine else None

    def of_call(self, module: Module, node: cst.CSTNode | None, local: Local | None = None) -> Source | None:
        """Return the Source of the Session that an expression makes: `SessionLocal()`, `next(get_db())`."""
        if not isinstance(node, cst.Call):
            return None
        if self.outside(module, node.func, local) in CLOSING and len(node.args) == 1:
            return self.of_call(module, node.args[0].value, local)
        if is_name(node.func, "next") and len(node.args) == 1:
            return self._of_function(module, node.args[0].value, local, generator=True)
        if (base := called(node, "begin")) is not None and not node.args:
            source = self.of_maker(module, base, local)
            return None if source is None or source.scoped else replace(source, commits=True, is_block=True)
        if self.outside(module, node.func, local) in SESSIONS:
            return self._of_session(module, node, local)
        if not node.args:
            made = self.of_maker(module, node.func, local)
            return made if made is not None else self._of_function(module, node, local, generator=False)
        return None

    def of_maker(self, module: Module, node: cst.CSTNode | None, local: Local | None = None) -> Source | None:
        """Return the Source that a sessionmaker or scoped_session is, by its name or as it is made."""
        if isinstance(node, cst.Call):
            return self._of_made(module, node, local)
        ref = self.resolve(module, node, local)
        if ref is None or ref.module is None or ref.rest or not isinstance(ref.value, cst.Call):
            return None
        source = self._of_made(ref.module, ref.value, None)
        if source is None:
            source = self._configured(ref)
        return None if source is None else replace(source, maker=ref)

    def _of_made(self, module: Module, call: cst.Call, local: Local | None) -> Source | None:
        what = self.outside(module, call.func, local)
        if what in SCOPED and len(call.args) == 1:
            source = self.of_maker(module, call.args[0].value, local)
            return None if source is None else replace(source, scoped=True)
        return self._of_session(module, call, local) if what in MAKERS else None

    def _of_session(self, module: Module, call: cst.Call, local: Local | None) -> Source | None:
        """`Session(engine, ...)` or `sessionmaker(engine, ...)`."""
        bind = argument(call, "bind")
        positional = [arg for arg in call.args if arg.keyword is None]
        if any(arg.star for arg in call.args) or len(positional) > 1 or (bind is not None and positional):
            return None
        found = bind or next(iter(positional), None)
        engine = None if found is None else self.engine(module, found.value, local)
        if engine is None:
            return None
        kind = self.outside(module, call.func, local) or ""
        options = [(arg.keyword.value, code(arg.value)) for arg in call.args if arg.keyword and arg is not bind]
        if (given := argument(call, "class_")) is not None:
            kind = self.outside(module, given.value, local) or code(given.value)
            options = [pair for pair in options if pair[0] != "class_"]
        elif kind in MAKERS:
            kind = "sqlalchemy.orm.Session"
        kind = "sqlmodel.Session" if kind.startswith("sqlmodel") else kind.replace("orm.session.", "orm.")
        return Source(engine, session_class=kind, options=tuple(options))

    def _configured(self, ref: Ref) -> Source | None:
        """`SessionLocal = sessionmaker()`, and `SessionLocal.configure(bind=engine)` in the same module."""
        assert ref.module is not None
        value = ref.value
        if not isinstance(value, cst.Call) or self.outside(ref.module, value.func) not in MAKERS:
            return None
        for node in own(ref.module.tree):
            if is_name(called(node, "configure"), ref.name):
                assert isinstance(node, cst.Call)
                joined = value.with_changes(args=[*value.args, *node.args])
                return self._of_session(ref.module, joined, None)
        return None

    # -- functions -----------------------------------------------------------------------------------------------------

    def _of_function(self, module: Module, node: cst.CSTNode, local: Local | None, *, generator: bool) -> Source | None:
        """A function of the project without parameters that returns a Session, yields one, or is a context manager."""
        if not isinstance(node, cst.Call) or node.args:
            return None
        ref = self.resolve(module, node.func, local)
        function = None if ref is None or ref.rest else ref.value
        if ref is None or ref.module is None or not isinstance(function, cst.FunctionDef) or function.asynchronous:
            return None
        if code(function.params) or ref in self._busy:
            return None
        managed = [self.outside(ref.module, one.decorator) in CONTEXT_MANAGERS for one in function.decorators]
        self._busy.add(ref)
        try:
            if managed == [True] and not generator:
                source = self._yielded(ref.module, function, context=True)
                source = source and replace(source, is_block=True)
            elif generator:
                source = None if managed else self._yielded(ref.module, function, context=False)
            else:
                source = None if managed else self._returned(ref.module, function)
        finally:
            self._busy.discard(ref)
        return None if source is None else replace(source, through=(*source.through, ref))

    def _returned(self, module: Module, function: cst.FunctionDef) -> Source | None:
        body = without_docstring(function)
        if len(body) == 2 and (made := assigned(body[0])) is not None:
            last = _returned_value(body[1])
            return self.of_call(module, made[1]) if is_name(last, made[0]) else None
        return self.of_call(module, _returned_value(body[0])) if len(body) == 1 else None

    def _yielded(self, module: Module, function: cst.FunctionDef, *, context: bool) -> Source | None:
        """`db = SessionLocal(); try: yield db; finally: db.close()`, or `with SessionLocal() as db: yield db`."""
        body = without_docstring(function)
        if len(body) == 1 and isinstance(body[0], cst.With):
            return self._yielded_in_with(module, body[0], context=context)
        made = assigned(body[0]) if len(body) == 2 else None
        if made is None or not isinstance(body[1], cst.Try):
            return None
        name, tried = made[0], body[1]
        commits = _commits_after_yield(block(tried.body), name)
        ends = block(tried.finalbody.body) if tried.finalbody else []
        tidy = all(called(expression(one) or one, "close", "remove") is not None for one in ends)
        handled = all(_rolls_back_and_raises(handler, name) for handler in tried.handlers)
        if commits is None or not tidy or not handled or tried.orelse or (commits and not context):
            return None
        source = self.of_call(module, made[1])
        return None if source is None or source.is_block else replace(source, commits=commits)

    def _yielded_in_with(self, module: Module, block_: cst.With, *, context: bool) -> Source | None:
        item = block_.items[0]
        name = item.asname.name if item.asname is not None else None
        if len(block_.items) != 1 or not isinstance(name, cst.Name):
            return None
        commits = _commits_after_yield(block(block_.body), name.value)
        source = self.of_call(module, item.item)
        if commits is None or source is None or ((commits or source.commits) and not context):
            return None
        return replace(source, commits=commits or source.commits)


def is_constant(name: cst.Name) -> bool:
    """Tell whether a name stands for the same everywhere."""
    return name.value in {"True", "False", "None"}


def without_docstring(function: cst.FunctionDef | cst.ClassDef) -> list[cst.BaseStatement]:
    """Return the statements of a body without its docstring."""
    body = block(function.body)
    if body and isinstance(expression(body[0]), cst.SimpleString | cst.ConcatenatedString):
        return body[1:]
    return body


def assigned(statement: cst.CSTNode) -> tuple[str, cst.BaseExpression] | None:
    """Return name and value of a line that gives one name a value."""
    if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) != 1:
        return None
    only = statement.body[0]
    if isinstance(only, cst.Assign) and len(only.targets) == 1 and isinstance(only.targets[0].target, cst.Name):
        return only.targets[0].target.value, only.value
    if isinstance(only, cst.AnnAssign) and isinstance(only.target, cst.Name) and only.value is not None:
        return only.target.value, only.value
    return None


def _returned_value(statement: cst.CSTNode) -> cst.BaseExpression | None:
    if isinstance(statement, cst.SimpleStatementLine) and isinstance(statement.body[-1], cst.Return):
        return statement.body[-1].value
    return None


def _commits_after_yield(body: list[cst.BaseStatement], name: str) -> bool | None:
    """Tell whether a COMMIT follows the `yield name`; None: something else happens there."""
    values = [expression(statement) for statement in body]
    if not values or not isinstance(values[0], cst.Yield) or not is_name(values[0].value, name):
        return None
    if len(values) == 1:
        return False
    return True if len(values) == 2 and values[1] and is_name(called(values[1], "commit"), name) else None


def _rolls_back_and_raises(handler: cst.ExceptHandler | cst.ExceptStarHandler, name: str) -> bool:
    """Tell whether a handler rolls back and raises on; it may log between."""
    body = block(handler.body)
    last = body[-1] if body else None
    raises = isinstance(last, cst.SimpleStatementLine) and isinstance(last.body[0], cst.Raise) and not last.body[0].exc
    rolled = any(is_name(called(expression(one) or one, "rollback"), name) for one in body)
    return raises and rolled and all(isinstance(one, cst.SimpleStatementLine) for one in body)
