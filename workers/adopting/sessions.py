"""Where a task gets its Session from, and which of its lines open and close it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import libcst as cst

from .makers import SESSIONS, Makers, Source, assigned
from .recipes import Recipe
from .source import (
    Imported,
    Ref,
    RefusedError,
    block,
    called,
    code,
    dotted,
    expression,
    is_name,
    local_imports,
    own,
    parents_of,
    walk,
)
from .tasks import Task

CLOSES = ("close", "remove")


@dataclass(eq=False)
class Opened:
    """A place where a task makes a Session."""

    node: cst.SimpleStatementLine | cst.With
    variable: str
    source: Source
    item: int = 0
    """Which item of the `with`."""
    begin: int | None = None
    """The item `db.begin()` of the same `with`."""


@dataclass(eq=False)
class Found:
    """What the Sessions of a task are."""

    task: Task
    parents: dict[cst.CSTNode, cst.CSTNode]
    opened: list[Opened] = field(default_factory=list)
    source: Source | None = None
    """Of a Session that is not made in the task: module-level, a scoped_session, the recipe's."""
    outer: Ref | None = None
    """A Session or scoped_session of the module's top."""
    recipe: Recipe | None = None
    aliases: set[str] = field(default_factory=set)
    nodes: set[cst.CSTNode] = field(default_factory=set)
    """Expressions that are a Session."""
    known: set[cst.CSTNode] = field(default_factory=set)
    """Those of them that are accounted for."""
    closers: list[cst.BaseStatement] = field(default_factory=list)
    """Statements that close a Session and do nothing else."""
    dropped: list[cst.BaseStatement] = field(default_factory=list)
    """Other statements that go: `db = None`, `gen = get_db()`."""
    begins: list[cst.With] = field(default_factory=list)
    """`with db.begin():`"""

    @property
    def sources(self) -> list[Source]:
        """Where its Sessions come from."""
        return [*(one.source for one in self.opened), *([self.source] if self.source is not None else [])]

    @property
    def is_empty(self) -> bool:
        """Whether the task has no Session."""
        return not self.opened and self.source is None

    @property
    def is_shared(self) -> bool:
        """Whether the Session is a scoped_session's."""
        return any(source.scoped for source in self.sources)

    @property
    def ends_with_commit(self) -> bool:
        """Whether the end of its block, or of its task class, commits."""
        by_block = any(one.source.commits or one.begin is not None for one in self.opened) or bool(self.begins)
        return by_block or (self.recipe is not None and self.recipe.commits)

    def is_in_loop(self, node: cst.CSTNode) -> bool:
        """Tell whether a statement may be executed several times."""
        while node is not self.task.node:
            node = self.parents[node]
            if isinstance(node, cst.For | cst.While):
                return True
        return False

    def is_session(self, node: cst.CSTNode) -> bool:
        """Tell whether an expression is a Session."""
        return node in self.nodes


def find(task: Task, makers: Makers, recipe: Recipe | None) -> Found:
    """Find the Sessions of a task.

    Raises:
        RefusedError: there is something that looks like one and is none that is known.
    """
    found = Found(task, parents_of(task.node), recipe=recipe)
    local = local_imports(task.node, task.module)
    generators = dict(_generators(task, makers))
    for node in own(task.node):
        if isinstance(node, cst.With):
            _with_items(found, node, makers)
        elif isinstance(node, cst.SimpleStatementLine) and (pair := assigned(node)) is not None:
            source = makers.of_call(task.module, generators.get(code(pair[1]), pair[1]), local)
            if source is not None and not source.is_block:
                found.opened.append(Opened(node, pair[0], source))
    if recipe is not None:
        _recipe_uses(found, recipe)
    _outer_uses(found, makers)
    names = {one.variable for one in found.opened} | found.aliases
    for node in walk(task.node.body):
        if is_name(node, *names) and _is_use(found.parents, node):
            found.nodes.add(node)
    for node in own(task.node):
        _known_statements(found, node, names, set(generators))
    if found.is_empty:
        _refuse_other_kinds(task, makers)
    _refuse_unknown(task, makers, names, local)
    _refuse_unfollowed(found, makers, local)
    return found


def _generators(task: Task, makers: Makers) -> Iterator[tuple[str, cst.BaseExpression]]:
    """`gen = get_db()` and then `next(gen)`: yield the text of the second, and what it means."""
    for node in own(task.node):
        pair = assigned(node)
        if pair is not None and isinstance(pair[1], cst.Call) and not pair[1].args:
            meant = cst.parse_expression(f"next({code(pair[1])})")
            if makers.of_call(task.module, meant, local_imports(task.node, task.module)) is not None:
                yield f"next({pair[0]})", meant


def _with_items(found: Found, statement: cst.With, makers: Makers) -> None:
    local = local_imports(found.task.node, found.task.module)
    for number, item in enumerate(statement.items):
        source = makers.of_call(found.task.module, item.item, local)
        if source is None:
            continue
        if statement.asynchronous is not None or item.asname is None or not isinstance(item.asname.name, cst.Name):
            raise RefusedError("its Session is made by a `with` that gives it no name", statement)
        one = Opened(statement, item.asname.name.value, source, number)
        for index, other in enumerate(statement.items):
            if is_name(called(other.item, "begin"), one.variable):
                one.begin = index
                found.known |= set(walk(other.item))
        found.opened.append(one)


def _recipe_uses(found: Found, recipe: Recipe) -> None:
    this = {name for name in (found.task.this, found.task.name) if name is not None}
    for node in walk(found.task.node.body):
        if isinstance(node, cst.Attribute) and is_name(node.value, *this):
            if node.attr.value in recipe.providers:
                found.nodes.add(node)
            elif node.attr.value in recipe.attributes:
                raise RefusedError(f"it uses {code(node)}, where its base class keeps the Session", node)
        elif recipe.getters and is_name(called(node, *recipe.getters), *this):
            found.nodes.add(node)
    for node in own(found.task.node):
        pair = assigned(node)
        if pair is not None and pair[1] in found.nodes:
            found.aliases.add(pair[0])
            found.known.add(pair[1])
    if found.nodes:
        found.source = recipe.source


def _outer_uses(found: Found, makers: Makers) -> None:
    """Uses of a Session, or of a scoped_session, that stands at the top of a module."""
    task = found.task
    local = local_imports(task.node, task.module)
    refs: dict[str, tuple[Ref, Source] | None] = dict.fromkeys(
        pair[0] for node in own(task.node) if (pair := assigned(node)) is not None
    )
    for node in walk(task.node.body):
        name = dotted(node) if isinstance(node, cst.Name | cst.Attribute) else None
        if name is None or not _is_use(found.parents, node):
            continue
        if name not in refs:
            refs[name] = _outer(makers, task, node, local)
        known = refs[name]
        above = found.parents[node]
        if known is None or (isinstance(above, cst.Call) and above.func is node):
            continue
        if found.outer is not None and (found.outer.module, found.outer.name) != (known[0].module, known[0].name):
            raise RefusedError(f"it uses two Sessions of modules: {found.outer.name}, {known[0].name}", node)
        found.outer, found.source = known
        found.nodes.add(node)


def _outer(makers: Makers, task: Task, node: cst.CSTNode, local: Mapping[str, Imported]) -> tuple[Ref, Source] | None:
    ref = makers.resolve(task.module, node, local)
    if ref is None or ref.module is None or ref.rest or not isinstance(ref.value, cst.Call):
        return None
    scoped = makers.of_maker(task.module, node, local)
    if scoped is not None:
        return (ref, scoped) if scoped.scoped else None
    made = makers.of_call(ref.module, ref.value)
    return None if made is None or made.is_block else (ref, made)


def _known_statements(found: Found, node: cst.CSTNode, names: set[str], generators: set[str]) -> None:
    """Account for what opens and closes a Session."""
    if isinstance(node, cst.If) and _is_guard(found, node, names):
        inner = [one for one in block(node.body) if _closes(found, one, generators)]
        if inner and len(inner) == len(block(node.body)) and node.orelse is None:
            found.closers.append(node)
            found.known |= set(walk(node))
    elif isinstance(node, cst.SimpleStatementLine):
        _known_line(found, node, names, generators)
    elif isinstance(node, cst.With) and len(node.items) == 1 and called(node.items[0].item, "begin") in found.nodes:
        found.begins.append(node)
        found.known |= set(walk(node.items[0]))


def _known_line(found: Found, line: cst.SimpleStatementLine, names: set[str], generators: set[str]) -> None:
    pair = assigned(line)
    if _closes(found, line, generators) and not found.known & set(walk(line)):
        found.closers.append(line)
        found.known |= set(walk(line))
    elif pair is None:
        return
    elif (pair[0] in names and is_name(pair[1], "None")) or f"next({pair[0]})" in generators:
        found.dropped.append(line)
    elif pair[0] in names and all(one.node is not line for one in found.opened) and pair[1] not in found.nodes:
        raise RefusedError(f"its Session {pair[0]!r} is replaced: {code(line)}", line)


def _closes(found: Found, statement: cst.CSTNode, generators: set[str]) -> bool:
    value = expression(statement)
    if value is None:
        return False
    base = called(value, *CLOSES)
    if base is not None and (base in found.nodes or f"next({code(base)})" in generators):
        return True
    # `Session.remove()` of a scoped_session that the task calls: `session = Session()`.
    makers = {one.source.maker.name for one in found.opened if one.source.scoped and one.source.maker is not None}
    if base is not None and called(value, "remove") is not None and code(base).rpartition(".")[2] in makers:
        return True
    return isinstance(value, cst.Call) and is_name(value.func, "next") and f"next({code(value.args[0])})" in generators


def _is_guard(found: Found, statement: cst.If, names: set[str]) -> bool:
    """`if db:`, `if db is not None:`, `if "db" in locals():`"""
    test = statement.test
    if test in found.nodes:
        return True
    if not isinstance(test, cst.Comparison) or len(test.comparisons) != 1:
        return False
    right = code(test.comparisons[0].comparator)
    return (test.left in found.nodes and right == "None") or (
        right == "locals()" and code(test.left).strip("'\"") in names
    )


def _is_use(parents: dict[cst.CSTNode, cst.CSTNode], node: cst.CSTNode) -> bool:
    """Tell whether a name is used here: not bound, no keyword, no attribute of something else."""
    parent = parents.get(node)
    if isinstance(parent, cst.Arg):
        return parent.keyword is not node
    if isinstance(parent, cst.Attribute):
        return parent.attr is not node
    if isinstance(parent, cst.AssignTarget | cst.AsName | cst.Param | cst.NameItem | cst.ImportAlias | cst.ImportFrom):
        return False
    return not (isinstance(parent, cst.AnnAssign) and parent.target is node)


def _refuse_other_kinds(task: Task, makers: Makers) -> None:
    """Refuse an AsyncSession, and Flask-SQLAlchemy's."""
    local = local_imports(task.node, task.module)
    for node in walk(task.node.body):
        if not isinstance(node, cst.Name | cst.Attribute):
            continue
        ref = makers.resolve(task.module, node, local)
        if ref is None:
            continue
        made_by = ref.name if ref.module is None else ""
        if ref.module is not None and isinstance(ref.value, cst.Call):
            made_by = makers.outside(ref.module, ref.value.func) or ""
        if made_by.startswith("sqlalchemy.ext.asyncio"):
            raise RefusedError("it uses an AsyncSession", node)
        if made_by == "flask_sqlalchemy.SQLAlchemy" and ref.rest[:1] == ("session",):
            raise RefusedError("its Session is Flask-SQLAlchemy's: docs/flask.md has the lines to add", node)


def _refuse_unfollowed(found: Found, makers: Makers, local: Mapping[str, Imported]) -> None:
    """Refuse a Session that is made, and given no name: `save(SessionLocal())`, `for db in get_db():`."""
    task = found.task
    followed: set[cst.CSTNode] = set()
    for one in found.opened:
        followed |= set(walk(one.node.items[one.item] if isinstance(one.node, cst.With) else one.node))
    for node in own(task.node):
        if not isinstance(node, cst.Call) or node in followed:
            continue
        made = makers.of_call(task.module, node, local)
        if made is None and makers.outside(task.module, node.func, local) in SESSIONS:
            raise RefusedError(f"how its Session is made is not found: {code(node)}", node)
        if made is not None:
            if found.is_shared and isinstance(found.parents[node], cst.Attribute):
                continue  # `Session().add(...)` of a scoped_session is `Session.add(...)`
            raise RefusedError(f"its Session is made where it cannot be followed: {code(found.parents[node])}", node)
        if isinstance(found.parents[node], cst.For) and not node.args:
            meant = cst.parse_expression(f"next({code(node)})")
            if makers.of_call(task.module, meant, local) is not None:
                raise RefusedError(f"its Session comes from a loop over {code(node)}", node)


def _refuse_unknown(task: Task, makers: Makers, known: set[str], local: Mapping[str, Imported]) -> None:
    """Refuse what behaves like a Session: something that is made in the task, and committed."""
    made: dict[str, cst.CSTNode] = {}
    for node in own(task.node):
        pair = assigned(node)
        if pair is not None:
            made[pair[0]] = pair[1]
        elif isinstance(node, cst.WithItem) and node.asname is not None:
            made[code(node.asname.name)] = node.item
    for node in own(task.node):
        base = called(node, "commit", "rollback", *(() if known else ("query", "scalars")))
        if isinstance(base, cst.Name) and base.value in made and base.value not in known:
            value = made[base.value]
            ref = makers.resolve(task.module, value.func, local) if isinstance(value, cst.Call) else None
            if ref is not None and isinstance(ref.value, cst.ClassDef):
                continue  # an object of the project's own
            how = code(made[base.value])
            raise RefusedError(
                f"how its Session {base.value!r} is made is not found, or decided at run time: {how}", node
            )
