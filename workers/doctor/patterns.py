"""Patterns written by hand that go wrong, found in the project's own code."""

from __future__ import annotations

import ast
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

from celery import Celery, signals
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from ...strategies.worker_pool import WorkerPool
from ..extension import Alchemy
from ..sharing import SharedRegistry
from ..task import DatabaseTask
from .code import Module, calls, class_node, function_node, modules_of, task_classes, value_of
from .findings import Finding, error, warning
from .sends import look_for_sends

_AFTER_THE_TASK = ("task_postrun", "task_success", "task_failure", "task_retry", "task_unknown")
_HOOKS = ("after_return", "on_success")


def look_for_patterns(app: Celery, alchemies: list[Alchemy], worker_pool: WorkerPool) -> Iterator[Finding]:
    """Yield what is found in the project's modules."""
    modules = modules_of(app)
    yield from _sessions_on_tasks(app, modules)
    yield from _globals(modules, alchemies, worker_pool)
    yield from _commits_too_late(app, modules)
    yield from look_for_sends(app, alchemies, modules)


def _sessions_on_tasks(app: Celery, modules: dict[str, Module]) -> Iterator[Finding]:
    for cls in task_classes(app):
        module = modules.get(cls.__module__)
        node = class_node(module, cls.__name__) if module is not None else None
        if module is None or node is None:
            continue
        for one in ast.walk(node):
            if not isinstance(one, ast.Assign | ast.AnnAssign) or not isinstance(one.value, ast.Call):
                continue
            targets = one.targets if isinstance(one, ast.Assign) else [one.target]
            on_task = one in node.body or any(_is_self(getattr(target, "value", None)) for target in targets)
            if on_task and _makes_session(modules, module, one.value):
                yield error(
                    "session-on-task",
                    f"{cls.__name__} keeps a Session on the Task object. A Task is one object for all requests of a "
                    f"process: under threads, gevent and eventlet they share the Session, and a retry, Ignore or "
                    f"Reject leaves its transaction open.",
                    "Use base=DatabaseTask of celery_alchemy and self.db; leave out the class.",
                    module.where(one),
                )
                break


def _globals(modules: dict[str, Module], alchemies: list[Alchemy], worker_pool: WorkerPool) -> Iterator[Finding]:
    given = {id(db._user_engine) for db in alchemies}
    seen: set[int] = set()
    for module in modules.values():
        for name, value in module.names.items():
            if id(value) in seen:
                continue
            where = _defined_at(module, name)
            if _is(value, Session):
                seen.add(id(value))
                yield error(
                    "global-session",
                    f"{name} is one Session for all tasks of a process, and for the pool processes that are forked "
                    f"from it: what one task has not committed, another commits or rolls back.",
                    "Use self.db, or db.session, which is the Session of the task that is running.",
                    where,
                )
            elif _is(value, Engine) and id(value) not in given:
                seen.add(id(value))
                yield (error if worker_pool.forks else warning)(
                    "engine-at-import",
                    f"{name} is an Engine made at import. Its connections cross the fork, where parent and children "
                    f"talk on one socket, and no line at worker start counts them.",
                    f"Let celery-alchemy have it: Alchemy(app, engine={name}). Or use db.engine.",
                    where,
                )
            elif _is(value, scoped_session) and not _is_ours(value):
                seen.add(id(value))
                yield warning(
                    "scoped-session",
                    f"{name} is a scoped_session of your own: whoever forgets to remove() it leaves a transaction "
                    f"open, and in a task it is not the Session of the unit of work.",
                    f"Write db.share({name}), and it is the task's Session in tasks; or use db.session.",
                    where,
                )


def _commits_too_late(app: Celery, modules: dict[str, Module]) -> Iterator[Finding]:
    remedy = "Commit in the task: with base=DatabaseTask its return commits, before the result is stored."
    for name in _AFTER_THE_TASK:
        signal = getattr(signals, name, None)
        for _, reference in signal.receivers or () if signal is not None else ():
            receiver = reference() if isinstance(reference, weakref.ReferenceType) else reference
            found = function_node(modules, receiver)
            for call in calls(found[1], "commit") if found is not None else ():
                assert found is not None
                yield error(
                    "commit-in-signal",
                    f"{found[1].name} commits in the signal {name}. By then the result is stored and the next task of "
                    f"a chain is sent; a COMMIT that fails is only logged.",
                    remedy,
                    found[0].where(call),
                )
    for cls in task_classes(app):
        module = modules.get(cls.__module__)
        node = class_node(module, cls.__name__) if module is not None else None
        if module is None or node is None or issubclass(cls, DatabaseTask):
            continue
        for method in node.body:
            for call in calls(method, "commit") if getattr(method, "name", "") in _HOOKS else ():
                yield error(
                    "commit-in-hook",
                    f"{cls.__name__} commits in a hook of the task. Celery skips hooks for some endings, and a COMMIT "
                    f"that fails there comes too late.",
                    remedy,
                    module.where(call),
                )


def _is_self(node: Any) -> bool:
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


def _makes_session(modules: dict[str, Module], module: Module, call: ast.Call, depth: int = 3) -> bool:
    maker = value_of(module, call.func)
    if isinstance(maker, sessionmaker | scoped_session) or (isinstance(maker, type) and issubclass(maker, Session)):
        return True
    # sessionmaker(bind=engine)()
    inner = value_of(module, call.func.func) if isinstance(call.func, ast.Call) else None
    if inner is sessionmaker or inner is scoped_session:
        return True
    # A function of the project's that returns one.
    found = function_node(modules, maker) if inspect.isfunction(maker) and depth else None
    if found is None:
        return False
    returned = [one.value for one in ast.walk(found[1]) if isinstance(one, ast.Return | ast.Yield)]
    return any(isinstance(one, ast.Call) and _makes_session(modules, found[0], one, depth - 1) for one in returned)


def _is(value: object, kind: type) -> bool:
    """As isinstance does, but without asking the value: a lazy object may not know yet what it is."""
    return issubclass(type(value), kind)


def _is_ours(value: scoped_session[Any]) -> bool:
    return isinstance(value.registry, SharedRegistry) or type(value.registry).__module__.startswith("celery_alchemy.")


def _defined_at(module: Module, name: str) -> str:
    for node in module.tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return module.where(node)
    return f"{module.path}:1"
