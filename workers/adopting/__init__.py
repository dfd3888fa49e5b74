"""`celery-alchemy adopt`: from Sessions managed by hand to celery-alchemy, by source code alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .adoption import Adoption
from .applying import apply
from .leftovers import Leftovers
from .source import Project, read
from .wiring import CannotWireError, Wirer, check_existing, find_place, resolve_placeholders

__all__ = ["Change", "Outcome", "adopt"]


@dataclass(frozen=True, slots=True)
class Change:
    """A file that is rewritten."""

    path: Path
    shown: str
    """Its path below the project."""
    old: str
    new: str

    def diff(self) -> str:
        """Return the change as a unified diff."""
        old, new = self.old.splitlines(keepends=True), self.new.splitlines(keepends=True)
        return "".join(difflib.unified_diff(old, new, f"a/{self.shown}", f"b/{self.shown}"))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done with a project."""

    changes: tuple[Change, ...] = ()
    refused: tuple[str, ...] = ()
    """A line for each task that stays as it is: file, line, reason."""
    unread: tuple[str, ...] = ()
    """A line for each file that is no Python of today."""
    notes: tuple[str, ...] = ()
    """A line for each function that opens a Session of its own below a task that is rewritten."""
    rewritten: int = 0
    """Tasks that are rewritten."""

    def lines(self, *, diff: bool) -> Iterator[str]:
        """Yield what is printed."""
        for change in self.changes:
            yield change.diff() if diff else f"{change.shown}: rewritten"
        yield from (*self.unread, *self.refused, *self.notes)
        did = "would be rewritten" if diff else "rewritten"
        yield f"{_tasks(self.rewritten)} {did}, {_tasks(len(self.refused))} left as they are"


def adopt(path: Path, *, write: bool) -> Outcome:
    """Rewrite the tasks of the files below `path`; without `write` only say what would change."""
    project = read(path)
    adoption = Adoption(project)
    adoption.decide()
    refused = [
        (task.module.shown, task.module.line(error.node or task.node), task.name, error.reason)
        for task, error in adoption.refused.items()
    ]
    changes: list[Change] = []
    if adoption.plans:
        try:
            changes = _rewrite(project, adoption)
        except CannotWireError as error:
            refused += [
                (task.module.shown, task.module.line(task.node), task.name, str(error)) for task in adoption.plans
            ]
            adoption.plans.clear()
    if write:
        for change in changes:
            change.path.write_bytes(change.new.encode())
    lines = [f"{shown}:{line}: {name} stays as it is: {reason}" for shown, line, name, reason in sorted(refused)]
    notes = sorted(
        f"{task.module.shown}:{task.module.line(task.node)}: {task.name} is rewritten, and {note}: let it take the "
        f"Session as a parameter"
        for task, plan in adoption.plans.items()
        for note in plan.notes
    )
    return Outcome(tuple(changes), tuple(lines), tuple(project.unread), tuple(notes), len(adoption.plans))


def _rewrite(project: Project, adoption: Adoption) -> list[Change]:
    plans = list(adoption.plans.values())
    users = [plan.task.module for plan in plans]
    wiring = find_place(project, adoption.makers, adoption.tasks, users)
    if wiring.exists:
        check_existing(project.module_at(wiring.path), wiring, adoption.makers, plans[0].source, adoption.shared)
    texts = {module.path: text for module, text in apply(adoption).items()}
    rest = Leftovers(project, texts)
    source = next((plan.source for plan in plans if plan.source.maker is not None), plans[0].source)
    shared = adoption.shared
    rest.remove_imports()
    candidates = {
        (ref.module.path, ref.name)
        for plan in plans
        for ref in (*(one for found in plan.found.sources for one in (*found.through, found.maker)), plan.found.outer)
        if ref is not None and ref.module is not None
    }
    candidates |= {(plan.recipe.module.path, plan.recipe.node.name.value) for plan in plans if plan.recipe is not None}
    for maker in (shared, None if source.is_plain else source.maker):
        if maker is not None and maker.module is not None:
            candidates.discard((maker.module.path, maker.name))
    rest.remove_unused(candidates)
    rest.remove_imports()
    if not wiring.exists:
        app = adoption.tasks.apps()[0].name
        Wirer(rest, wiring, source, shared, app).write()
        rest.remove_imports()
    resolve_placeholders(rest, wiring)
    old = {module.path: module for module in project.modules}
    return [
        Change(path, old[path].shown, old[path].source, text)
        for path, text in rest.texts.items()
        if text != old[path].source
    ]


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count} tasks"
