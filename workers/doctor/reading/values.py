"""What an expression stands for, as far as it can be told without running it."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, replace
from typing import Any

from .project import Module

Function = ast.FunctionDef | ast.AsyncFunctionDef
_SQLALCHEMY = {"sqlalchemy", "sqlmodel", "flask_sqlalchemy", "flask_sqlalchemy_lite"}
#: What a call of a name makes; of SQLAlchemy's names the last part counts, wherever they are imported from.
_MADE = {
    "create_engine": "engine",
    "engine_from_config": "engine",
    "create_async_engine": "async_engine",
    "async_engine_from_config": "async_engine",
    "sessionmaker": "maker",
    "async_sessionmaker": "maker",
    "Session": "session",
    "AsyncSession": "session",
    "scoped_session": "scoped",
    "async_scoped_session": "scoped",
    "SQLAlchemy": "flask_db",
    "declarative_base": "base",
    "automap_base": "base",
}
_BASES = {"DeclarativeBase", "DeclarativeBaseNoMeta", "MappedAsDataclass", "SQLModel", "Model", "DeferredReflection"}
_TASKS = {"Task", "DatabaseTask", "AsyncDatabaseTask"}
OURS = "celery_alchemy"


@dataclass(slots=True, eq=False)
class Value:
    """Something that code works with.

    Kinds: external (a name of a library, and what calls of it return), import, module, function, class, instance,
    constant, list, method; engine, connection, maker, session, scoped, flask_db, base, query, entity, entities, field
    (of an entity), alchemy, celery, task, signature, context (a context manager), generator.
    """

    kind: str
    name: str = ""
    """Of external things: the dotted name, `()` for each call: requests.Session().get."""
    node: ast.AST | None = None
    """Where it was made or defined."""
    module: Module | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    """Other values: an Engine of a Session, the receiver of a method, an instance's attributes."""

    def but(self, **changed: Any) -> Value:
        """Return the same, but for some parts."""
        return replace(self, parts={**self.parts, **changed})

    @property
    def is_session(self) -> bool:
        return self.kind in {"session", "scoped", "connection"}

    @property
    def key(self) -> Any:
        """What tells one Session from another."""
        return self.parts.get("key") or self.node

    @property
    def root(self) -> str:
        return self.name.partition(".")[0].partition("(")[0]

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]


UNKNOWN = Value("external", "?")


def external(name: str, **parts: Any) -> Value:
    """Return a name of a library."""
    return Value("external", name, parts=parts)


def constant(value: object, node: ast.AST | None = None) -> Value:
    """Return a value that is written in the code."""
    return Value("constant", node=node, parts={"value": value})


def literal(value: Value | None, default: Any = None) -> Any:
    """Return the constant that a value is; `default` for anything else."""
    return value.parts["value"] if value is not None and value.kind == "constant" else default


def made_by(value: Value) -> str:
    """Return the kind of what a call of an external name returns; empty where it is nothing of interest."""
    if value.kind != "external":
        return ""
    if value.root in _SQLALCHEMY and "(" not in value.name:
        return _MADE.get(value.last, "")
    if value.root == OURS and value.last == "Alchemy":
        return "alchemy"
    if value.root == "celery" and value.last == "Celery":
        return "celery"
    if value.root == "celery" and value.last in {"chain", "group", "chord", "signature", "chunks", "xmap", "xstarmap"}:
        return "signature"
    return ""


def commits_itself(session: Value) -> bool:
    """Tell whether each statement of a Session commits itself."""
    engine = session.parts.get("engine")
    options = engine.parts.get("options", {}) if engine is not None else {}
    return bool(session.parts.get("autocommit")) or literal(options.get("isolation_level")) == "AUTOCOMMIT"


def is_mapped(value: Value | None, depth: int = 8) -> bool:
    """Tell whether a class is one whose objects a Session keeps."""
    if value is None or not depth:
        return False
    if value.kind == "base" or (value.kind == "method" and value.name == "Model"):
        return True
    if value.kind == "external":
        return value.root in _SQLALCHEMY and value.last in _BASES
    if value.kind != "class":
        return False
    if any(getattr(base, "last", "") == "SQLModel" for base in value.parts["bases"]):
        return bool(literal(value.parts["keywords"].get("table")))
    return any(is_mapped(base, depth - 1) for base in value.parts["bases"])


def bases_of(value: Value | None, depth: int = 8) -> list[Value]:
    """Return a class and its bases, as far as they are known, the nearest first."""
    if value is None or not depth:
        return []
    found = [value]
    for base in value.parts.get("bases", ()) if value.kind == "class" else ():
        found += bases_of(base, depth - 1)
    return found


def is_task_class(value: Value | None) -> bool:
    """Tell whether a class is one of tasks."""
    return any(
        one.kind == "external" and one.root in {"celery", OURS} and one.last in _TASKS for one in bases_of(value)
    )


def is_ours(value: Value | None) -> bool:
    """Tell whether a class of tasks is, or is derived from, DatabaseTask of celery-alchemy."""
    return any(one.kind == "external" and one.root == OURS and one.last in _TASKS for one in bases_of(value))
