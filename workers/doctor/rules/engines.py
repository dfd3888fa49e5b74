"""Engines: those that connect before a fork, those made for each task, those of another event loop."""

from __future__ import annotations

from ..reading.state import Event, Use
from ..reading.values import Value
from .facts import NOT_INITIALIZED, Facts

EVERY = "every Engine"


def has_no_pool(engine: Value) -> bool:
    """Tell whether an Engine keeps no connection."""
    pool = engine.parts.get("poolclass")
    return pool is not None and getattr(pool, "last", "") in {"NullPool", "StaticPool"}


def on_used(event: Event, facts: Facts) -> None:
    """An Engine has connected."""
    engine = event.value
    if event.entry.kind != "import" or engine is None or engine.name == "ours" or has_no_pool(engine):
        return
    name, key = event.entry.name, engine.key
    if (key, name) in facts.connected_by:
        return
    facts.connected_by.add((key, name))
    facts.connected.add(key)

    def holds() -> bool:
        left = key in facts.connected and not {key, EVERY} & (facts.child_forgets | facts.child_closes)
        return left and facts.forks and name in facts.worker_modules

    facts.add("engine-at-import", event, holds=lambda: holds() and not facts.guarded, module=name)
    facts.add("engine-at-import", event, holds=lambda: holds() and facts.guarded, level="note", module=name)


def on_dispose(event: Event, facts: Facts) -> None:
    """An Engine was told to close its connections, or to forget them."""
    assert event.value is not None
    key = event.value.key
    if event.entry.kind == "import":
        facts.connected.discard(key)
    elif event.entry.kind == "process_init" and event.info["close"] is False:
        facts.child_forgets.add(key)
    elif event.entry.kind == "process_init":
        facts.child_closes.add(key)
        facts.add("dispose-in-child", event, holds=lambda: key in facts.connected and facts.forks and not facts.guarded)


def on_guarded(event: Event, facts: Facts) -> None:
    """An Engine, or every one, discards connections of another process."""
    assert event.value is not None
    facts.child_forgets.add(event.value.key if event.value.kind.endswith("engine") else EVERY)


def on_made(event: Event, facts: Facts) -> None:
    """Something was made."""
    value = event.value
    assert value is not None
    if value.kind in {"engine", "async_engine"}:
        facts.count("Engines", value.node)
        if event.entry.kind == "process_init":
            pools = sorted(facts.pools & NOT_INITIALIZED)
            facts.add("engine-in-process-init", event, holds=lambda: bool(pools), pools=" and ".join(pools))
    elif value.kind in {"maker", "scoped"}:
        facts.count("session factories", value.node)
    elif value.kind == "session":
        facts.count("Sessions", value.node)
    elif value.kind == "alchemy":
        facts.guarded = True
    elif value.kind == "flask_db":
        facts.flask = True
        facts.count("session factories", value.node)
    elif value.kind == "celery":
        facts.roots.add(event.module.name)


def on_left(event: Event, use: Use, facts: Facts) -> None:
    """A task was left, and this is an Engine that it has made."""
    if (
        use.unclosed
        and not event.info["failed"]
        and not use.escaped
        and use.made is not None
        and not has_no_pool(use.value)
    ):
        facts.add("engine-per-task", event, at=use.made, name=event.entry.name)


def on_new_loop(event: Event, facts: Facts) -> None:
    """A coroutine ran in an event loop of its own."""
    assert event.value is not None
    if not has_no_pool(event.value):
        facts.add("async-engine-loop", event, at=event.info["at"])


def on_pushed(event: Event, facts: Facts) -> None:
    """A Flask context was pushed, not in a `with` block."""
    name = event.entry.name

    def holds() -> bool:
        reached = event.entry.kind != "import" or name in facts.worker_modules | facts.know_the_app
        removed = any(isinstance(key, tuple) and key[0] == "flask" for key in facts.removed)
        return facts.flask and reached and not removed

    if event.entry.kind in {"import", "process_init", "hook"}:
        facts.add("context-pushed-once", event, holds=holds)
