"""A whole project: which of its tasks are rewritten, and what that needs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import libcst as cst

from .makers import Makers, Source
from .planning import DATABASE_TASK, Plan, Planner
from .recipes import Recipe, find_recipe
from .source import Module, Project, Ref, RefusedError, argument, called, code, local_imports, own, walk
from .tasks import Task, Tasks

PATCHES = re.compile(r"""(?:patch|setattr)\w*\(\s*(?:f?["']([\w.]+)\.(\w+)["']|([\w.]+)\s*,\s*["'](\w+)["'])""")
Owner = tuple[Module, cst.ClassDef]


class Adoption:
    """Decides for each task of a project."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.makers: Makers = Makers(project)
        self.tasks: Tasks = Tasks(project, self.makers)
        self.all: list[Task] = list(self.tasks.all())
        self.plans: dict[Task, Plan] = {}
        self.refused: dict[Task, RefusedError] = {}
        self._recipes: dict[cst.ClassDef, Recipe | str | None] = {}
        self.by_ref: dict[tuple[Module, str], Task] = {
            (one.module, one.name): one for one in self.all if not one.nested
        }
        self._patched = [
            (parts[0] or parts[2], parts[1] or parts[3])
            for text in (*(module.source for module in project.modules), project.around)
            for parts in PATCHES.findall(text)
        ]
        self._planner = Planner(self.makers, self.tasks, dict(self._called_directly()))

    def decide(self) -> None:
        """Plan every task that can be rewritten."""
        for task in self.all:
            try:
                plan = self._plan(task)
            except RefusedError as error:
                self.refused[task] = error
                continue
            if plan is not None:
                self.plans[task] = plan
        self._one_database()
        self._whole_classes()

    # -- each task -----------------------------------------------------------------------------------------------------

    def _plan(self, task: Task) -> Plan | None:
        chain = self.chain_of(task)
        if any(self.tasks.kind_of_base(module, base.value) == "ours" for module, cls in chain for base in cls.bases):
            return None
        if task.base is not None and not chain:
            if self.tasks.kind_of_base(task.module, task.base) == "ours":
                return None
            if self.tasks.kind_of_base(task.module, task.base) is None:
                plan = self._planner.plan(task, None, None)
                what = code(task.base)
                if plan is not None:
                    raise RefusedError(f"its base class {what} is from elsewhere: write a class of both", task.node)
                return None
        recipe = self._recipe_of(chain)
        if isinstance(recipe, str):
            raise RefusedError(f"it has a base class {recipe}", task.node)
        root = next((one for one in chain if self._is_root(one)), None)
        plan = self._planner.plan(task, recipe, root)
        if plan is not None:
            if task.cls is None and task.base is None and not chain and (replaced := self._replaced_task()):
                raise RefusedError(
                    f"its task class is given by {replaced}: let that derive from DatabaseTask", task.node
                )
            self._refuse_patched(task, plan)
            self._refuse_outer(plan)
        return plan

    def chain_of(self, task: Task) -> list[Owner]:
        """Return the task classes of the project that a task derives from, the nearest first."""
        if task.cls is not None:
            return self.tasks.chain(task.module, task.cls)
        ref = self.makers.resolve(task.module, task.base) if task.base is not None else self._task_cls(task)
        if ref is None or ref.module is None or ref.rest or not isinstance(ref.value, cst.ClassDef):
            return []
        return self.tasks.chain(ref.module, ref.value)

    def _replaced_task(self) -> str | None:
        """Return the line that gives an app another task class: `celery.Task = ContextTask`."""
        for module in self.project.modules:
            for node in walk(module.tree) if ".Task" in module.source else ():
                target = node.target if isinstance(node, cst.AssignTarget) else None
                if isinstance(target, cst.Attribute) and target.attr.value == "Task" and not module.is_test:
                    return f"{code(target)} in {module.shown}:{module.line(target)}"
        return None

    def _task_cls(self, task: Task) -> Ref | None:
        """Return the class that `Celery(task_cls=...)` names."""
        ref = task.app or next(iter(self.tasks.apps()), None)
        value = ref.value if ref is not None else None
        given = argument(value, "task_cls") if isinstance(value, cst.Call) else None
        if given is None or ref is None or ref.module is None:
            return None
        if isinstance(given.value, cst.SimpleString):
            return self.project.lookup(re.split("[.:]", str(given.value.evaluated_value)), ref.module)
        return self.makers.resolve(ref.module, given.value)

    def recipe(self, owner: Owner) -> Recipe | str | None:
        """Return the recipe that a class is."""
        if owner[1] not in self._recipes:
            self._recipes[owner[1]] = find_recipe(*owner, self.makers)
        return self._recipes[owner[1]]

    def _recipe_of(self, chain: list[Owner]) -> Recipe | str | None:
        found = [one for one in map(self.recipe, chain) if one is not None]
        return next((one for one in found if isinstance(one, Recipe)), next(iter(found), None))

    def _is_root(self, owner: Owner) -> bool:
        return any(self.tasks.kind_of_base(owner[0], base.value) == "celery" for base in owner[1].bases)

    def _refuse_patched(self, task: Task, plan: Plan) -> None:
        """Refuse a task of which a test replaces something that would go."""
        names = {name for source in plan.found.sources for name in _names(source)}
        names |= (
            plan.recipe.providers | plan.recipe.attributes | {plan.recipe.node.name.value} if plan.recipe else set()
        )
        for place, name in self._patched:
            modules = {task.module.path.stem, task.name, *(one.path.stem for one in _modules(plan.source))}
            if name in names and place.rpartition(".")[2] in modules:
                raise RefusedError(f"a test replaces {place}.{name}, which would not be used any more", task.node)

    def _refuse_outer(self, plan: Plan) -> None:
        """Refuse a task with a Session of its module that other code uses as well: it would be another one there."""
        outer = plan.found.outer
        if outer is None or plan.shared is not None:
            return
        tasks = {node for task in self.all for node in walk(task.node)}
        for module in self.project.modules:
            for node in walk(module.tree) if outer.name in module.source else ():
                name = node.value if isinstance(node, cst.Name) else None
                ref = self.makers.resolve(module, node) if name in module.names and node not in tasks else None
                used = ref is not None and ref.module is outer.module and ref.name == outer.name
                if used and not self._is_binding(module, node):
                    where = f"{module.shown}:{module.line(node)}"
                    raise RefusedError(
                        f"its Session {outer.name} stands at the top of a module, and {where} uses it too"
                    )

    def _is_binding(self, module: Module, node: cst.CSTNode) -> bool:
        bound = [
            one for one in walk(module.tree) if isinstance(one, cst.AssignTarget | cst.ImportAlias | cst.AnnAssign)
        ]
        return any(node in set(walk(one)) for one in bound)

    def _called_directly(self) -> Iterator[tuple[cst.CSTNode, str]]:
        """Yield the tasks that code calls like functions, and the caller's name."""
        for module in self.project.modules:
            if module.is_test:
                continue
            for function in (node for node in walk(module.tree) if isinstance(node, cst.FunctionDef)):
                local = local_imports(function, module)
                for call in (node for node in own(function) if isinstance(node, cst.Call)):
                    ref = self.makers.resolve(module, called(call, "run") or call.func, local)
                    task = self.by_ref.get((ref.module, ref.name)) if ref is not None and ref.module else None
                    if task is not None and ref is not None and not ref.rest and task.cls is None:
                        yield task.node, function.name.value

    # -- all together --------------------------------------------------------------------------------------------------

    def _one_database(self) -> None:
        """All tasks get their Session from one place: the one that most of them use."""
        count = Counter(plan.source.database for plan in self.plans.values())
        if not count:
            return
        (first, _), *_ = count.most_common(1)
        for task, plan in list(self.plans.items()):
            if plan.source.database != first:
                self._refuse(task, "its Session is on another database, or has other options, than that of most tasks")
            elif plan.shared is not None and plan.shared != self.shared:
                self._refuse(task, "it uses another scoped_session than other tasks")

    @property
    def shared(self) -> Ref | None:
        """The scoped_session that is to be shared."""
        return next((plan.shared for plan in self.plans.values() if plan.shared is not None), None)

    def _whole_classes(self) -> None:
        """A class is changed for all its tasks, or for none."""
        again = True
        while again:
            again = False
            for holder in {self.holder(plan) for plan in self.plans.values()} - {None}:
                under = [one for one in self.all if any(cls is holder for _, cls in self.chain_of(one))]
                bad = next((one for one in under if one in self.refused), None)
                for task in under if bad is not None else ():
                    if task in self.plans and bad is not None and holder is not None:
                        name = holder.name.value
                        self._refuse(
                            task, f"its base class {name} keeps the Session of {bad.name} too, which is refused"
                        )
                        again = True

    def holder(self, plan: Plan) -> cst.ClassDef | None:
        """Return the class that is changed for a task; None: `base=` says DatabaseTask instead of a class of which
        nothing is left."""
        if plan.recipe is None:
            return None
        classes = [cls for _, cls in self.chain_of(plan.task)]
        at = classes.index(plan.recipe.node)
        if plan.recipe.is_pure and at > 0:
            return classes[at - 1]
        return None if plan.recipe.is_pure and plan.task.base is not None else plan.recipe.node

    def _refuse(self, task: Task, reason: str) -> None:
        self.plans.pop(task, None)
        self.refused[task] = RefusedError(reason, task.node)

    # -- what is written into the decorator ----------------------------------------------------------------------------

    def options(self, plan: Plan) -> dict[str, str]:
        """Return the options of the task's decorator."""
        options = {}
        replaced = plan.rebased is None if plan.recipe is None else self.holder(plan) is None
        if replaced:
            options["base"] = DATABASE_TASK
        if plan.commits is False:
            options["commit_on_success"] = "False"
        return options


def _names(source: Source) -> set[str]:
    refs = [source.maker, *source.through]
    return {ref.name for ref in refs if ref is not None} | {"Session", source.engine.name}


def _modules(source: Source) -> list[Module]:
    refs = [source.maker, source.engine, *source.through]
    return [ref.module for ref in refs if ref is not None and ref.module is not None]
