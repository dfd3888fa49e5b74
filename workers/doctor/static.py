"""The examination of source files: every module is read, then every task, hook, signal and other function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .findings import LEVELS, Finding, Level
from .reading.names import LATE_HOOKS
from .reading.project import Project, read_path
from .reading.state import Entry, Event
from .reading.statements import Walker
from .reading.values import Value, is_ours, is_task_class
from .rules import engines, session_state, sessions, tasks
from .rules.catalogue import CATALOGUE, finding
from .rules.facts import Facts

_AFTER_THE_TASK = {"task_postrun", "task_success", "task_failure", "task_retry", "task_unknown"}
_HOOKS = {"before_start", "__call__"}
RULES: dict[str, Any] = {
    "made": engines.on_made,
    "engine-used": engines.on_used,
    "dispose": engines.on_dispose,
    "guarded": engines.on_guarded,
    "new-loop": engines.on_new_loop,
    "pushed": engines.on_pushed,
    "assigned": sessions.on_assigned,
    "in-class": sessions.on_in_class,
    "on-task": sessions.on_task_attribute,
    "left": sessions.on_left,
    "closed": sessions.on_closed,
    "commit": sessions.on_commit,
    "broken": sessions.on_broken,
    "swallowed": sessions.on_swallowed,
    "library": sessions.on_library,
    "slow": sessions.on_slow,
    "nested": sessions.on_nested,
    "generator": sessions.on_generator,
    "spawn": sessions.on_spawn,
    "kept": sessions.on_kept,
    "thread-local": sessions.on_thread_local,
    "left-out": tasks.on_left_out,
    "statement": session_state.on_statement,
    "task": tasks.on_task,
    "no-base": tasks.on_no_base,
    "injected": tasks.on_injected,
    "send": tasks.on_send,
    "on-commit": tasks.on_on_commit,
    "share": tasks.on_share,
    "follow": tasks.on_share,
}


@dataclass(slots=True)
class Reading:
    """What was found in source files, and what was read."""

    where: str
    files: int
    counts: dict[str, int] = field(default_factory=dict)
    pools: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def of(self, level: Level) -> list[Finding]:
        return [one for one in self.findings if one.level == level]

    def __str__(self) -> str:
        counted = ", ".join(_counted(count, what) for what, count in self.counts.items())
        pools = " and ".join(self.pools) or "not said, so prefork is assumed"
        return f"read {_counted(self.files, 'files')} in {self.where}: {counted}; worker pool: {pools}"


def _counted(count: int, what: str) -> str:
    one = f"{what.removesuffix('ies')}y" if what.endswith("ies") else what.removesuffix("s")
    return f"{count} {one if count == 1 else what}"


def examine_path(path: Path, *, pool: str | None = None) -> Reading:
    """Examine the source files below a folder, or one file; nothing is imported."""
    return read(read_path(path), str(path), pools={pool} if pool else set())


def read(
    project: Project,
    where: str,
    *,
    pools: set[str],
    settings: dict[str, Any] | None = None,
    shares: bool | None = None,
) -> Reading:
    """Examine modules of a project.

    Args:
        settings: What the app says of them; without it, what the code sets them to.
        shares: The app shares a scoped_session; None: as the code says.
    """
    facts = Facts(project, settings=settings or {}, pools=pools, shares=shares)
    _Examination(facts).run()
    found = [*facts.findings(), *_about_comments(project)]
    found += [finding("unreadable", str(path), what=why) for path, why in project.unreadable]
    found.sort(key=lambda one: (LEVELS.index(one.level), one.code, one.where))
    names = ("tasks", "Engines", "session factories", "Sessions")
    counts = {name: len(facts.counts.get(name, ())) for name in names}
    return Reading(where, len(project.modules), counts, sorted(facts.pools), found)


def _about_comments(project: Project) -> Iterator[Finding]:
    for module in project.modules.values():
        for line, codes in module.ignored.items():
            for code in sorted(codes - set(CATALOGUE)):
                yield finding("unknown-ignore", f"{module.path}:{line}", what=repr(code) if code else "no code at all")


class _Examination:
    """One reading of a project."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.walker = Walker(facts.project, self._notify)
        self.methods: dict[ast.AST, tuple[Value, str]] = {}

    def _notify(self, event: Event) -> None:
        rule = RULES.get(event.kind)
        if rule is not None:
            rule(event, self.facts)

    def run(self) -> None:
        """Read the modules, then every function in them, and those that these define."""
        for module in self.facts.project.modules.values():
            self.walker.env_of(module)
        done: set[Any] = set()
        while True:
            self._find_methods()
            waiting = [one for one in self._entries() if one[0].node not in done]
            if not waiting:
                break
            for entry, function, owner in waiting:
                done.add(entry.node)
                self.walker.run(entry, function, owner)
        self.facts.in_tasks = self.walker.reached
        self._find_worker_modules()

    def _find_methods(self) -> None:
        for cls in list(self.walker.classes.values()):
            for name, member in cls.parts["env"].items():
                if member.kind == "function" and member.node is not None:
                    self.methods.setdefault(member.node, (cls, name))

    def _entries(self) -> Iterator[tuple[Entry, Value, Value | None]]:
        """Yield every function, how it is called, and its `self`."""
        signals = {function.node: (signal, function) for signal, function in self.walker.handlers}
        for node, task in list(self.walker.tasks.items()):
            self.walker.settle(task)
            base, function = task.parts["base"], task.parts["function"]
            commits = sessions.commits_at_return(base, task.parts["options"])
            commits = commits and self.facts.settings.get("alchemy_commit_on_success") is not False
            owner = self.walker.self_of(task) if task.parts["bind"] else None
            yield Entry("task", task.name, node, task, is_ours(base), commits), function, owner
        for node, function in list(self.walker.functions.items()):
            if node in self.walker.tasks:
                continue
            if node in self.methods:
                yield self._of_method(node, function)
            elif node in signals:
                yield Entry(_kind(signals[node][0]), function.name, node, signal=signals[node][0]), function, None
            else:
                yield Entry("function", function.name, node), function, None
        for one, (signal, function) in signals.items():
            if one is not None and one not in self.walker.functions:
                yield Entry(_kind(signal), function.name, one, signal=signal), function, None

    def _of_method(self, node: ast.AST, function: Value) -> tuple[Entry, Value, Value | None]:
        cls, name = self.methods[node]
        owner = None if "static" in function.parts["flags"] else self.walker.instance_of(cls, node)
        owner = cls if "class" in function.parts["flags"] else owner
        kind, ours = "function", is_ours(cls)
        if is_task_class(cls):
            kind = "task" if name == "run" else "late" if name in LATE_HOOKS else "hook" if name in _HOOKS else kind
            if name == "run":
                self.facts.roots.add(function.module.name if function.module is not None else "")
                self.facts.count("tasks", node)
        commits = kind == "task" and sessions.commits_at_return(cls, {})
        return (
            Entry(kind, f"{cls.name}.{name}" if kind == "function" else cls.name, node, None, ours, commits),
            function,
            owner,
        )

    def _find_worker_modules(self) -> None:
        for name, env in self.walker.envs.items():
            if any(self.walker.resolve(value).kind == "celery" for value in env.values()):
                self.facts.know_the_app.add(name)
        waiting = list(self.facts.roots)
        found = self.facts.worker_modules
        while waiting:
            name = waiting.pop()
            if name in found:
                continue
            found.add(name)
            waiting += self.walker.imports.get(name, ())
            package = name.rpartition(".")[0]
            if package in self.facts.project.modules:
                waiting.append(package)


def _kind(signal: str) -> str:
    return "late" if signal in _AFTER_THE_TASK else "process_init" if signal == "worker_process_init" else "hook"
