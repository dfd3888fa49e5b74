"""What the structure promises: private parts in their rooms, short functions, little that all of a process shares."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import celery_alchemy

PACKAGE = Path(celery_alchemy.__file__).parent
FILES = {
    str(path.relative_to(PACKAGE)): path
    for folder in ("strategies", "workers")
    for path in sorted((PACKAGE / folder).rglob("*.py"))
}
#: Here stand the private parts of SQLAlchemy, Celery and the drivers.
ROOMS = ("strategies/_sqlalchemy.py", "strategies/_sqlalchemy_pools.py", "workers/_celery.py", "strategies/drivers/")
#: Of the standard library: the caller's line and where a thread is, for a message; a signal's handler without an enum
#: of it. And what SQLAlchemy's own pool classes override.
ALLOWED = {"_getframe", "_current_frames", "_replace", "_do_get", "_signal"}


@functools.cache
def trees() -> dict[str, ast.Module]:
    """The parsed files, made when they are first asked for: each process of a run imports this module."""
    return {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", "_celery_alchemy"))


def our_own() -> set[str]:
    """The names with an underscore that our own code defines."""
    found: set[str] = set()
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and owner(node) == "self":
                found.add(node.attr)
    return found


def owner(node: ast.Attribute) -> str | None:
    return node.value.id if isinstance(node.value, ast.Name) else None


def of_others(tree: ast.AST, ours: set[str]) -> Iterator[tuple[str, int]]:
    """Yield the private names of other people's objects that a module uses, and the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and owner(node) not in {"self", "cls"}:
            if node.attr not in ours | ALLOWED:
                yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"getattr", "setattr", "hasattr"}:
            name = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else ""
            if isinstance(name, str) and is_private(name) and name not in ours:
                yield name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module or "", node.lineno) for part in (node.module or "").split(".") if is_private(part))


def test_private_parts_of_others_stand_in_their_rooms() -> None:
    """With the version they were tried on, and what breaks without them."""
    ours = our_own()
    wrong = [
        f"{name}:{line} {attribute}"
        for name, tree in trees().items()
        if not name.startswith(ROOMS)
        for attribute, line in of_others(tree, ours)
    ]
    assert wrong == []


def test_a_private_part_elsewhere_is_found() -> None:
    tree = ast.parse("def f(pool):\n    pool._overflow += 1\n    return getattr(pool, '_pool')\n")
    assert [name for name, _ in of_others(tree, our_own())] == ["_overflow", "_pool"]


def test_no_function_is_longer_than_sixty_lines() -> None:
    long = [
        f"{name}: {node.name}"
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert long == []


#: What all of a process shares, because a fork, a signal or a thread forces it: fork guard, interrupts, scope; which
#: apps, Engines, Session classes and drivers have been seen; what is watched, and by whom.
SHARED = {
    "strategies/interrupts.py": {"_interrupt_types", "current_interruption", "shield"},
    "strategies/place.py": {"_place"},
    "strategies/scope.py": {"scopes"},
    "strategies/sessions.py": {"_classes"},
    "strategies/asynchronous/loop_thread.py": {"_process"},
    "strategies/drivers/awaited_mysql.py": {"_places"},
    "strategies/drivers/awaited_psycopg.py": {"_making"},
    "strategies/drivers/base.py": {"_drivers", "_unknown"},
    "strategies/engines/callers.py": {"_around"},
    "strategies/engines/elsewhere.py": {"_running", "_unnoted"},
    "strategies/engines/forks.py": {
        "_pools", "_records", "_detached", "_private", "_callbacks", "_graveyard", "_pinned", "_registered",
        "_refusing",
    },
    "strategies/engines/leaks.py": {"_library_modules"},
    "strategies/features/following.py": {"_followed", "_open"},
    "strategies/features/foreign_callbacks.py": {"_all"},
    "strategies/features/on_event_loop.py": {"_tasks", "_threads"},
    "strategies/watching/statements.py": {"_outside", "_watched", "_wanted"},
    "workers/apps.py": {"_all"},
    "workers/asyncio_pool/identity.py": {"_identity"},
    "workers/exactly_once/apart.py": {"_warned"},
    "workers/sending/arguments.py": {"_warned"},
    "workers/sending/broker.py": {"_brokers"},
    "workers/sending/celerys_own.py": {"_sending"},
    "workers/sending/following.py": {"_told"},
    "workers/sending/orders.py": {"_ordered", "_sent"},
    "workers/sending/outbox.py": {"_executor", "_last_look", "_places", "collecting"},
    "workers/watching/observers.py": {"_observers"},
    "workers/watching/outbox.py": {"_looking"},
    "workers/watching/processes.py": {"_pool_processes", "_FORKS"},
}  # fmt: skip


def shared(tree: ast.Module) -> set[str]:
    """The names of a module that hold what changes: containers that begin empty, calls of classes, `global`s."""
    found = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        name = targets[0].id if isinstance(targets[0], ast.Name) else ""
        empty = (isinstance(value, ast.List) and not value.elts) or (isinstance(value, ast.Dict) and not value.keys)
        called = getattr(getattr(value, "func", None), "attr", None) or getattr(getattr(value, "func", None), "id", "")
        makes = {"set", "WeakSet", "WeakKeyDictionary", "ContextVar", "Shield", "PoolProcesses", "Driver"}
        if empty or called in makes:
            found.add(name)
    return found


@pytest.mark.parametrize("name", FILES)
def test_what_all_of_a_process_shares_is_listed(name: str) -> None:
    assert shared(trees()[name]) == SHARED.get(name, set())
