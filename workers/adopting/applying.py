"""Makes the changes of all plans, module by module."""

from __future__ import annotations

import libcst as cst

from .adoption import Adoption
from .planning import ALCHEMY, DATABASE_TASK, Plan
from .recipes import Recipe
from .rewriting import Change, Edits, Rename, statement, with_base, with_options
from .sends import on_commit
from .source import Module, argument, block
from .tasks import Task, looks_like_app


def apply(adoption: Adoption) -> dict[Module, str]:
    """Return the new text of each module in which something changes."""
    edits: dict[Module, Edits] = {}
    recipes: set[Recipe] = set()
    derived: dict[cst.ClassDef, Recipe] = {}
    rebased: dict[cst.ClassDef, Module] = {}
    for task, plan in adoption.plans.items():
        mine = edits.setdefault(task.module, Edits())
        mine.take(plan.edits)
        _sends(adoption, plan, mine)
        _options(adoption, task, plan, mine)
        if plan.renames is not None:
            mine.add(task.node, _renaming(plan.renames))
        holder = adoption.holder(plan)
        if plan.recipe is not None and holder is plan.recipe.node:
            recipes.add(plan.recipe)
        elif plan.recipe is not None and holder is not None:
            derived[holder] = plan.recipe
        elif plan.recipe is None and plan.rebased is not None:
            rebased[plan.rebased[1]] = plan.rebased[0]
    for holder, recipe in derived.items():
        _derive_anew(adoption, holder, recipe, edits)
    for recipe in recipes:
        _without_session(adoption, recipe, edits)
    for cls, module in rebased.items():
        _derive(adoption, module, cls, edits.setdefault(module, Edits()))
    return {module: one.apply(module.tree).code for module, one in edits.items()}


def _sends(adoption: Adoption, plan: Plan, edits: Edits) -> None:
    for send in plan.sends:
        task = (
            adoption.by_ref.get((send.ref.module, send.ref.name)) if send.ref is not None and send.ref.module else None
        )
        this = getattr(send.what, "value", None) in {plan.task.this, plan.task.name}
        is_ours = this or (task is not None and task in adoption.plans)

        def change(call: cst.Call, is_ours: bool = is_ours) -> cst.Call:
            assert isinstance(call.func, cst.Attribute)
            return on_commit(call, is_ours=is_ours, alchemy=ALCHEMY, what=call.func.value)

        edits.add(send.call, change)


def _options(adoption: Adoption, task: Task, plan: Plan, edits: Edits) -> None:
    options = adoption.options(plan)
    if task.decorator is not None:
        if options:
            edits.add(task.decorator, with_options(options))
    elif task.cls is not None and "commit_on_success" in options:
        edits.add(task.cls, _with_line("commit_on_success = False\n"))


def _with_line(text: str) -> Change:
    def change(cls: cst.ClassDef) -> cst.ClassDef:
        body = block(cls.body)
        at = next((i for i, one in enumerate(body) if isinstance(one, cst.FunctionDef)), len(body))
        lines = [*body[:at], statement(text), *body[at:]]
        return cls.with_deep_changes(cls.body, body=lines)

    return change


def _renaming(rename: Rename) -> Change:
    return lambda node: node.visit(rename)


def _without_session(adoption: Adoption, recipe: Recipe, edits: dict[Module, Edits]) -> None:
    """Take the Session out of a class that stays, and let the class derive from DatabaseTask."""
    mine = edits.setdefault(recipe.module, Edits())
    tasks = {task.node for task in adoption.plans}
    rename = Rename({"self"}, recipe.providers, recipe.getters)
    for member, left in recipe.left.items():
        if left is None:
            mine.remove(member)
        elif member not in tasks:
            mine.add(member, lambda _, left=left: left.visit(rename))  # type: ignore[misc]
    _rename_below(adoption, recipe.node, rename, edits)
    _derive(adoption, recipe.module, recipe.node, mine)
    _name_in_apps(adoption, recipe, edits)


def _derive_anew(adoption: Adoption, holder: cst.ClassDef, recipe: Recipe, edits: dict[Module, Edits]) -> None:
    """Let a class derive from DatabaseTask instead of a class of which nothing is left."""
    module = next(one for one in adoption.project.modules if holder in one.tree.body)
    mine = edits.setdefault(module, Edits())
    for index, base in enumerate(holder.bases):
        ref = adoption.makers.resolve(module, base.value)
        if ref is not None and ref.value is recipe.node:
            mine.add(holder, with_base(index, DATABASE_TASK))
    rename = Rename({"self"}, recipe.providers, recipe.getters)
    tasks = {task.node for task in adoption.plans}
    for member in block(holder.body):
        if member not in tasks:
            mine.add(member, _renaming(rename))
    _rename_below(adoption, holder, rename, edits)


def _rename_below(adoption: Adoption, top: cst.ClassDef, rename: Rename, edits: dict[Module, Edits]) -> None:
    """Rename the Session in the classes that derive from one."""
    tasks = {task.node for task in adoption.plans}
    for module in adoption.project.modules:
        for node in module.tree.body:
            above = adoption.tasks.chain(module, node)[1:] if isinstance(node, cst.ClassDef) else []
            if not isinstance(node, cst.ClassDef) or all(cls is not top for _, cls in above):
                continue
            for member in block(node.body):
                if member not in tasks:
                    edits.setdefault(module, Edits()).add(member, _renaming(rename))


def _derive(adoption: Adoption, module: Module, cls: cst.ClassDef, edits: Edits) -> None:
    for index, base in enumerate(cls.bases):
        if adoption.tasks.kind_of_base(module, base.value) == "celery":
            edits.add(cls, with_base(index, DATABASE_TASK))
            return


def _name_in_apps(adoption: Adoption, recipe: Recipe, edits: dict[Module, Edits]) -> None:
    """`Celery(task_cls=Recipe)` of a recipe of which nothing is left says DatabaseTask."""
    if not recipe.is_pure:
        return
    ours = cst.parse_expression('"celery_alchemy:DatabaseTask"')
    for ref in adoption.tasks.apps():
        call = ref.value
        given = argument(call, "task_cls") if isinstance(call, cst.Call) else None
        if given is not None and ref.module is not None and looks_like_app(ref.name):
            edits.setdefault(ref.module, Edits()).add(given, lambda arg: arg.with_changes(value=ours))
