"""Tasks: what they are sent, when, and how they are declared."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator

from ...task import DatabaseTask
from ..reading.state import Event
from ..reading.values import Value, commits_itself, is_ours, literal
from .facts import Facts

#: What a decorator may say: attributes of the class, and options of a message.
_OPTIONS = {name for name in dir(DatabaseTask) if not name.startswith("_")}
_OPTIONS |= {"base", "bind", "lazy", "shared", "autoretry_for", "dont_autoretry_for", "retry_kwargs", "retry_backoff"}
_OPTIONS |= {"retry_backoff_max", "retry_jitter", "queue", "routing_key", "exchange", "delivery_mode", "compression"}
_OPTIONS |= {"pydantic", "pydantic_strict", "pydantic_context", "pydantic_dump_kwargs", "filter", "options", "app"}


def on_task(event: Event, facts: Facts) -> None:
    """A task was declared."""
    task = event.value
    assert task is not None
    facts.count("tasks", event.node)
    facts.roots.add(event.module.name)
    for name in task.parts["options"]:
        nearest = difflib.get_close_matches(name, _OPTIONS, 1, 0.8)
        if name not in _OPTIONS and not name.startswith("_") and name != "**" and nearest:
            keyword = next((one for one in _decorators(event.node) if one.arg == name), event.node)
            facts.add("task-option", event, at=(event.module, keyword), option=name, nearest=nearest[0])


def _decorators(node: ast.AST) -> Iterator[ast.keyword]:
    for one in getattr(node, "decorator_list", ()):
        yield from one.keywords if isinstance(one, ast.Call) else ()


def on_left_out(event: Event, facts: Facts) -> None:
    """A call was not gone through."""
    assert event.value is not None
    if event.entry.kind in {"task", "late", "hook"}:
        at = (event.info["module"], event.entry.node or event.node)
        facts.add("not-read", event, at=at, name=event.entry.name, why=event.info["why"], first=event.value.name)


def on_no_base(event: Event, facts: Facts) -> None:
    """A task uses what its class does not have."""
    attr = event.info["attr"]
    name = event.value.name if event.value is not None else ""
    facts.add("missing-base", event, name=name, attr=attr)


def on_injected(event: Event, facts: Facts) -> None:
    """A task has a parameter for its Session."""
    task = event.value
    if task is None:
        return  # a function that no decorator known here has made a task
    if not is_ours(task.parts["base"]) and task.parts["bare"]:
        facts.add("missing-base", event, name=task.name, attr="CurrentSession")


def on_send(event: Event, facts: Facts) -> None:
    """A task was sent."""
    for value in _flat([*([event.value] if event.value is not None else []), *event.info.get("args", [])]):
        if value.kind in {"entity", "entities"} or value.is_session:
            what = "A Session" if value.is_session else "An object of the database"
            facts.add("objects-as-arguments", event, what=what)
            break
    if event.entry.kind == "import" or facts.settings.get("alchemy_enqueue_on_commit") is True:
        return
    options = event.value.parts.get("options", {}) if event.value is not None else {}
    if "enqueue_on_commit" in {**options, **event.info.get("keywords", {})}:
        return
    if event.entry.task is not None and read_only(event.entry.task):
        return
    for use in event.state.sessions.values():
        if use.writes and not commits_itself(use.value):
            facts.add("sends-before-commit", event, name=event.entry.name)


def _flat(values: list[Value], depth: int = 4) -> Iterator[Value]:
    for value in values if depth else ():
        yield value
        if value.kind == "list":
            yield from _flat(value.parts["items"], depth - 1)
        elif value.kind == "signature":
            yield from _flat(value.parts.get("args", []), depth - 1)


def on_on_commit(event: Event, facts: Facts) -> None:
    """Something waits for a commit."""
    for value in _flat(event.info.get("args", [])):
        if value.kind in {"entity", "entities"}:
            facts.add("objects-as-arguments", event, what="An object of the database")
    inside = any(use.value.name == "ours" and use.unclosed for use in event.state.sessions.values())
    if event.entry.kind not in {"function", "hook"} or inside or "session" in event.info["keywords"]:
        return
    node = event.node
    assert isinstance(node, ast.Call)
    function = event.entry.node

    def holds() -> bool:
        sends = facts.settings.get("alchemy_on_commit_outside") == "send"
        return facts.guarded and not sends and not facts.waits and function not in facts.in_tasks

    facts.add("on-commit-outside", event, holds=holds, name=event.entry.name, call=ast.unparse(node.func))


def on_share(event: Event, facts: Facts) -> None:
    """A Session is shared or followed."""
    facts.waits = facts.waits or event.kind == "follow" or facts.shares is not False


def read_only(task: Value) -> bool:
    """Tell whether a task writes nothing."""
    return literal(task.parts.get("options", {}).get("read_only")) is True
