"""What a whole project says: its settings, and which of its modules a worker imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..findings import Finding, Level
from ..reading.project import POOLS, Module, Project
from ..reading.state import Event
from .catalogue import finding

_SETTINGS = ("alchemy_", "worker_pool")
_OPTION = re.compile(rf"(?:--pool[= ]|-P ?)({'|'.join(POOLS)})\b")
NOT_INITIALIZED = {"threads", "gevent", "eventlet", "asyncio"}
"""Worker pools under which Celery never sends worker_process_init."""


@dataclass(slots=True)
class Candidate:
    """A finding, unless the whole project says otherwise."""

    module: Module
    node: ast.AST
    finding: Finding
    holds: Callable[[], bool]


@dataclass(slots=True)
class Facts:
    """The project, as far as it was read, and what was found in it."""

    project: Project
    settings: dict[str, Any] = field(default_factory=dict)
    pools: set[str] = field(default_factory=set)
    """The worker pools of its workers; none where nothing says so."""
    guarded: bool = False
    """There is an Alchemy, which guards every Engine across forks."""
    waits: bool = False
    """A Session is shared or followed: on-commit sends wait for it."""
    shares: bool | None = None
    """What the app says of a shared scoped_session; None: as the code says."""
    flask: bool = False
    names: dict[Any, str] = field(default_factory=dict)
    """What a scoped_session is called."""
    closed: set[Any] = field(default_factory=set)
    """Sessions that are closed somewhere."""
    closed_at_import: set[Any] = field(default_factory=set)
    committed: set[Any] = field(default_factory=set)
    removed: set[Any] = field(default_factory=set)
    """Sessions that hooks and signals close or remove."""
    connected: set[Any] = field(default_factory=set)
    """Engines with connections once everything is imported."""
    connected_by: set[Any] = field(default_factory=set)
    child_forgets: set[Any] = field(default_factory=set)
    """Engines of which the pool process calls dispose(close=False)."""
    child_closes: set[Any] = field(default_factory=set)
    in_tasks: set[ast.AST] = field(default_factory=set)
    """Functions that tasks call."""
    texts: dict[Any, list[str]] = field(default_factory=dict)
    """The SQL that each task executes."""
    counts: dict[str, set[Any]] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    roots: set[str] = field(default_factory=set)
    """Modules that define tasks, or a Celery app."""
    know_the_app: set[str] = field(default_factory=set)
    """Modules that define a Celery app, or import one."""
    worker_modules: set[str] = field(default_factory=set)
    """Modules that a worker imports."""

    def __post_init__(self) -> None:
        self.settings = {**settings_in(self.project), **self.settings}
        self.pools = self.pools or self.project.pools | {
            value for name, value in self.settings.items() if name == "worker_pool" and isinstance(value, str)
        }

    @property
    def forks(self) -> bool:
        return not self.pools or "prefork" in self.pools

    def add(
        self,
        code: str,
        event: Event,
        *,
        at: tuple[Module, ast.AST] | None = None,
        holds: Callable[[], bool] = lambda: True,
        level: Level | None = None,
        **words: str,
    ) -> None:
        """Note a finding."""
        module, node = at or (event.module, event.node)
        made = finding(code, module.where(node), level=level, **words)
        self.candidates.append(Candidate(module, node, made, holds))

    def count(self, what: str, key: Any) -> None:
        """Note one more of what was read."""
        self.counts.setdefault(what, set()).add(key)

    def findings(self) -> Iterator[Finding]:
        """Yield what holds, each once, and not what a comment silences."""
        seen: set[tuple[str, str]] = set()
        for one in self.candidates:
            key = (one.finding.code, one.finding.where)
            if key in seen or not one.holds() or one.finding.code in _ignored_at(one.module, one.node):
                continue
            seen.add(key)
            yield one.finding


def _ignored_at(module: Module, node: ast.AST) -> set[str]:
    start = getattr(node, "lineno", 1)
    end = start if isinstance(node, ast.stmt) and hasattr(node, "body") else getattr(node, "end_lineno", start)
    return {code for line in range(start, end + 1) for code in module.ignored.get(line, ())}


def settings_in(project: Project) -> dict[str, Any]:
    """Return the settings of ours, and the worker pool, that code sets to a constant, in whatever way."""
    found: dict[str, Any] = {}
    for module in project.modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.List) and "worker" in (words := _words(node)):
                for pool in _OPTION.findall(" ".join(words)):
                    found["worker_pool"] = pool
            for name, value in _named(node):
                setting = name.lower().removeprefix("celery_") if name.isupper() else name
                if setting.startswith(_SETTINGS) and isinstance(value, ast.Constant):
                    found[setting] = value.value
                elif setting.startswith(_SETTINGS):
                    found.setdefault(setting, value)
    return found


def _words(node: ast.List) -> list[str]:
    return [one.value for one in node.elts if isinstance(one, ast.Constant) and isinstance(one.value, str)]


def _named(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Name | ast.Attribute):
                yield getattr(target, "id", getattr(target, "attr", "")), node.value
            elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                yield str(target.slice.value), node.value
    elif isinstance(node, ast.keyword) and node.arg:
        yield node.arg, node.value
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, value
