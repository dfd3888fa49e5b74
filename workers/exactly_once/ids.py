"""Ids for what comes after a task, made of its own: each copy sends the same messages, and their receivers know them.

Celery gives the callbacks of `link` and `link_error` a new id at each delivery, and so whoever receives them could not
tell a copy from another message.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from ...strategies.features.completed import Key
from ...strategies.features.completed_table import recorded_id

_NAMESPACE = uuid.UUID("5f0c1f9e-6a3c-4a8e-9d53-0a6f6a1e7c11")
#: Keyword arguments of a canvas that are signatures.
_CANVAS = {
    "celery.chain": ("tasks",),
    "celery.group": ("tasks",),
    "celery.chord": ("header", "body"),
}


def derived(key: Key, *place: object) -> str:
    """Return the id of what stands at `place` of what the task with this key sends."""
    return str(uuid.uuid5(_NAMESPACE, "\n".join(map(str, (key.task_id, key.nesting, *place)))))


def fix_links(request: Any, key: Key) -> None:
    """Give what `request` calls when it succeeds, or fails, its ids."""
    for name in ("callbacks", "errbacks"):
        for number, signature in enumerate(getattr(request, name, None) or ()):
            fix(signature, key, name, number)
    fix_errbacks(getattr(request, "chord", None))


def fix_errbacks(signature: Any) -> None:
    """Give what is called when `signature`, the body of a chord, or its header, fails its ids: any member may call it,
    and so may each of its copies."""
    if not isinstance(signature, Mapping):
        return
    if signature.get("task") == "celery.group":
        for one in (signature.get("kwargs") or {}).get("tasks") or ():
            fix_errbacks(one)
        return
    options = signature.get("options") or {}
    errbacks = options.get("link_error") or ()
    for number, one in enumerate(errbacks if isinstance(errbacks, list | tuple) else (errbacks,)):
        fix(one, Key(str(options.get("task_id"))), "errbacks", number)


def fix(signature: Any, key: Key, *place: object) -> None:
    """Give `signature`, and what it consists of, ids where they have none."""
    if isinstance(signature, list | tuple):
        for number, one in enumerate(signature):
            fix(one, key, *place, number)
    if not isinstance(signature, Mapping):
        return
    found: Any = signature
    options = found.get("options")
    if options is None:
        options = found["options"] = {}
    options.setdefault("task_id", derived(key, *place))
    for name in _CANVAS.get(found.get("task") or "", ()):
        fix((found.get("kwargs") or {}).get(name), key, *place, name)


def key_of(request: Any) -> Key:
    """Return what names `request`, whenever it is delivered."""
    return Key(recorded_id(str(request.id)), int(getattr(request, "replaced_task_nesting", 0) or 0))
