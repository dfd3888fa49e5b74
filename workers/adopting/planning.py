"""Decides, for one task, how it is rewritten; or refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import libcst as cst

from . import handlers
from .after import following, is_harmless
from .flow import Flow, is_plain
from .helpers import Helper, Helpers
from .makers import Makers, Source
from .recipes import Recipe
from .rewriting import Edits, Rename, flat, unit_block, unit_item, with_parameter, without_finally, without_item
from .sends import Send, find_sends
from .sessions import Found, Opened, find
from .source import Module, Ref, RefusedError, block, code, dotted, is_name, own, walk
from .tasks import Task, Tasks
from .uses import Scope, Uses

#: Names that are put in place at the end, when it is known which names a module has left.
DATABASE_TASK, CURRENT_SESSION, ALCHEMY = "DatabaseTask__adopted", "CurrentSession__adopted", "alchemy__adopted"


@dataclass(eq=False)
class Plan:
    """How one task is rewritten."""

    task: Task
    found: Found
    edits: Edits
    """Of its function."""
    source: Source
    commits: bool | None = None
    """False: `commit_on_success=False`. None: its units of work are blocks, which say it themselves."""
    recipe: Recipe | None = None
    rebased: tuple[Module, cst.ClassDef] | None = None
    """The task class of the project that is to derive from DatabaseTask."""
    sends: list[Send] = field(default_factory=list)
    renames: Rename | None = None
    handled: set[cst.CSTNode] = field(default_factory=set)
    """Statements that close a Session, where a block ends it now."""
    notes: list[str] = field(default_factory=list)
    """What stays beside its Session: functions that open one of their own."""

    @property
    def shared(self) -> Ref | None:
        """The scoped_session whose Session the task uses."""
        return self.source.maker if self.source.scoped else None


def _may_use(plan: Plan, call: cst.Call) -> bool:
    """Tell whether a call may do something with the Session: it is given it, or finds it by itself."""
    found, task = plan.found, plan.task
    if any(arg.value in found.nodes for arg in call.args):
        return True
    base = call.func.value if isinstance(call.func, cst.Attribute) else None
    if base in found.nodes or is_plain(call):
        return False
    if plan.shared is not None or (found.outer is not None):
        return True
    return plan.recipe is not None and task.this is not None and is_name(base, task.this) and not _celerys(call)


def _celerys(call: cst.Call) -> bool:
    assert isinstance(call.func, cst.Attribute)
    return call.func.attr.value in {"retry", "update_state", "replace", "apply_async", "delay", "s", "si", "signature"}


def _loaded(found: Found) -> set[str]:
    """Return the variables that are given what the Session returns."""
    return {
        name.value
        for line in own(found.task.node)
        if isinstance(line, cst.Assign | cst.For)
        and any(node in found.nodes for node in walk(line.value if isinstance(line, cst.Assign) else line.iter))
        for target in ([one.target for one in line.targets] if isinstance(line, cst.Assign) else [line.target])
        for name in walk(target)
        if isinstance(name, cst.Name)
    }


class Planner:
    """Decides."""

    def __init__(self, makers: Makers, tasks: Tasks, called_directly: dict[cst.CSTNode, str]) -> None:
        self._makers, self._tasks = makers, tasks
        self._uses = Uses(makers, tasks, lambda scope: handlers.refuse_swallowed(scope, makers))
        self._helpers = Helpers(makers, tasks, self._uses)
        self._called_directly = called_directly

    def plan(self, task: Task, recipe: Recipe | None, base: tuple[Module, cst.ClassDef] | None) -> Plan | None:
        """Return how a task is rewritten; None: it has no Session.

        Args:
            recipe: Of the task's base class, or of its own class.
            base: The task class of the project that its base class, or itself, comes down to.
        Raises:
            RefusedError: it is not understood.
        """
        found = find(task, self._makers, recipe)
        if found.is_empty and recipe is None:
            self._refuse_helpers(task)
            return None
        self._check_task(task, found, recipe)
        for opened in found.opened:
            found.known |= set(walk(opened.node.items[opened.item])) if isinstance(opened.node, cst.With) else set()
        databases = {source.database for source in found.sources}
        if len(databases) > 1:
            raise RefusedError("it has Sessions on two databases, or with different options", task.node)
        source = next(iter(found.sources), None) or (recipe.source if recipe is not None else None)
        assert source is not None
        scope = Scope(task.module, task.node, found.is_session, found.known, task.cls, helper=False)
        self._uses.check_threads(scope)
        if recipe is not None and not recipe.only_cleans:
            _refuse_passed_on(task)
        self._uses.check(scope)
        plan = Plan(task, found, Edits(), source, recipe=recipe)
        if recipe is None:
            plan.rebased = base
        self._choose(plan)
        plan.notes = [str(one) for one in self._below(plan) if one.is_own]
        return plan

    def _refuse_helpers(self, task: Task) -> None:
        """Refuse a task without a Session of its own, if a function that it calls has one."""
        scope = Scope(task.module, task.node, lambda node: False, cls=task.cls, helper=False)
        for helper in self._helpers.below(scope, set()):
            raise RefusedError(f"{helper}: let it take the Session as a parameter", task.node)

    def _below(self, plan: Plan) -> Iterator[Helper]:
        """Yield the functions that a task calls, and that open a Session beside the one of the task."""
        through = (ref.value for found in plan.found.sources for ref in found.through)
        known: set[cst.CSTNode] = {one for one in through if isinstance(one, cst.FunctionDef)}
        known |= set(walk(plan.recipe.node)) if plan.recipe is not None else set()
        scope = Scope(plan.task.module, plan.task.node, plan.found.is_session, cls=plan.task.cls, helper=False)
        return self._helpers.below(scope, known)

    def _check_task(self, task: Task, found: Found, recipe: Recipe | None) -> None:
        if task.nested:
            raise RefusedError("it is defined inside a function", task.node)
        if task.node.asynchronous is not None:
            raise RefusedError("it is an `async def` function", task.node)
        if any(isinstance(node, cst.Yield) for node in own(task.node)):
            raise RefusedError("it is a generator", task.node)
        others = [one for one in task.node.decorators if one is not task.decorator]
        if others and not found.is_empty:
            raise RefusedError(f"it has another decorator: {code(others[0])}", task.node)
        parameters = {one.value for one in walk(task.node.params) if isinstance(one, cst.Name)}
        outer = {item.name.value for one in own(task.node) if isinstance(one, cst.Global) for item in one.names}
        for opened in found.opened:
            if opened.variable in parameters | outer:
                raise RefusedError(f"{opened.variable!r} is also a parameter, or a global name", opened.node)
        if recipe is not None and found.opened and not recipe.only_cleans:
            raise RefusedError("it makes a Session beside that of its base class", found.opened[0].node)
        if found.outer is not None and found.opened and not found.is_shared:
            raise RefusedError("it makes a Session beside one of its module", found.opened[0].node)
        if recipe is not None and task.node in self._called_directly and found.nodes:
            caller = self._called_directly[task.node]
            raise RefusedError(f"{caller} calls it like a function: there it would join the caller's transaction")

    # -- one unit of work for the task, or blocks ----------------------------------------------------------------------

    def _choose(self, plan: Plan) -> None:
        found, task = plan.found, plan.task
        flow = Flow(found.is_session, lambda call: _may_use(plan, call), _loaded(found))
        body = block(task.node.body)
        committed = flow.all_committed(body)
        late = [one for one in found.closers if not self._ends_there(found, one)]
        as_whole = not late and task.node not in self._called_directly and self._is_one(found)
        if as_whole:
            plan.commits = found.ends_with_commit or committed
            self._whole(plan)
        elif plan.shared is not None or not found.opened:
            why = "it goes on after it has closed its Session" if late else "other tasks call it like a function"
            raise RefusedError(why, late[0] if late else task.node)
        else:
            for opened in found.opened:
                self._as_block(plan, opened)
            if left := [one for one in found.closers if one not in plan.handled]:
                raise RefusedError("where its Sessions begin and end is not clear", left[0])
        for name, handler in handlers.to_roll_back(found, self._makers):
            plan.edits.add(handler, handlers.rolling_back(name))
        plan.sends = find_sends(found, flow, self._makers)
        if plan.recipe is not None:
            this = [name for name in (task.this, task.name) if name is not None]
            plan.renames = Rename(this, plan.recipe.providers, plan.recipe.getters)

    def _is_one(self, found: Found) -> bool:
        """Tell whether the task has one Session that may live until its end."""
        if len(found.begins) > 1 or any(not self._nothing_after(found, one) for one in found.begins):
            if not found.opened or not all(isinstance(one.node, cst.With) for one in found.opened):
                raise RefusedError("it begins transactions by hand", found.begins[0])
            return False
        if not found.opened:
            return True
        if len(found.opened) > 1:
            return False
        opened = found.opened[0].node
        holder = found.parents[found.parents[opened]]
        if isinstance(opened, cst.With):
            return holder is found.task.node and self._nothing_after(found, opened)
        return not found.is_in_loop(opened)

    def _nothing_after(self, found: Found, statement: cst.CSTNode) -> bool:
        return all(is_harmless(found, one) for one in following(found, statement))

    def _ends_there(self, found: Found, closer: cst.BaseStatement) -> bool:
        """Tell whether nothing of weight happens after a Session has been closed."""
        return not found.is_in_loop(closer) and self._nothing_after(found, closer)

    def _whole(self, plan: Plan) -> None:
        """The task is the unit of work: its Session is a parameter, or `self.db`, or shared."""
        found, edits = plan.found, plan.edits
        for closer in [*found.closers, *found.dropped]:
            edits.remove(closer)
        self._tidy_up(plan)
        for begin in found.begins:
            edits.add(begin, without_item(0))
        for opened in found.opened:
            self._without_opening(plan, opened)
        if found.outer is not None and not found.is_shared:
            self._outer_as_parameter(plan, found.outer.name)

    def _without_opening(self, plan: Plan, opened: Opened) -> None:
        edits, shared = plan.edits, opened.source.scoped
        if isinstance(opened.node, cst.With):
            if opened.begin is not None:
                edits.add(opened.node, without_item(max(opened.begin, opened.item)))
            if shared:
                line = cst.parse_statement(f"{opened.variable} = {code(opened.node.items[opened.item].item)}")
                edits.add(opened.node, lambda node: flat(node, [line, *block(node.body)]))
            else:
                edits.add(opened.node, without_item(opened.item))
        elif not shared:
            edits.remove(opened.node)
        if not shared:
            edits.add(plan.task.node, with_parameter(opened.variable, CURRENT_SESSION))

    def _outer_as_parameter(self, plan: Plan, name: str) -> None:
        for node in plan.found.nodes - plan.found.known:
            if dotted(node) != name:
                plan.edits.add(node, lambda _: cst.Name(name))
        names = [one.name.value for one in plan.task.node.params.params]
        if name in names:
            raise RefusedError(f"it has a parameter with the name of its Session: {name}", plan.task.node)
        plan.edits.add(plan.task.node, with_parameter(name, CURRENT_SESSION))

    def _tidy_up(self, plan: Plan) -> None:
        for node in own(plan.task.node):
            if isinstance(node, cst.Try) and node.finalbody is not None:
                plan.edits.add(node, without_finally)

    # -- blocks --------------------------------------------------------------------------------------------------------

    def _as_block(self, plan: Plan, opened: Opened) -> None:
        """A unit of work of its own: `with alchemy.unit_of_work() as db:`"""
        commits = opened.source.commits or opened.begin is not None
        if isinstance(opened.node, cst.With):
            self._with_as_block(plan, opened, commits)
            return
        above = plan.found.parents[opened.node]
        siblings = list(getattr(above, "body", ()))
        index = siblings.index(opened.node)
        following_one = siblings[index + 1] if index + 1 < len(siblings) else None
        if isinstance(following_one, cst.Try) and following_one.finalbody is not None:
            closers = [one for one in block(following_one.finalbody.body) if one in plan.found.closers]
            if closers:
                self._try_as_block(plan, opened, following_one, closers)
                return
        closer = next((one for one in siblings[index + 1 :] if one in plan.found.closers), None)
        if closer is None:
            raise RefusedError(f"where its Session {opened.variable!r} ends is not clear", opened.node)
        self._lines_as_block(plan, opened, above, closer)

    def _with_as_block(self, plan: Plan, opened: Opened, commits: bool) -> None:
        assert isinstance(opened.node, cst.With)
        inner = [one for one in plan.found.begins if one in set(walk(opened.node.body))]
        if inner:
            if [*block(opened.node.body)] != inner:
                raise RefusedError("it begins transactions by hand", inner[0])
            commits = True
            plan.edits.add(inner[0], without_item(0))
        if opened.begin is not None:
            plan.edits.add(opened.node, without_item(opened.begin))
        item = unit_item(opened.variable, ALCHEMY, commits)

        def change(node: cst.With) -> cst.With:
            items = list(node.items)
            items[opened.item] = items[opened.item].with_changes(item=item.item)
            return node.with_changes(items=items)

        plan.edits.add(opened.node, change)
        for closer in plan.found.closers:
            if closer in set(walk(opened.node)):
                if not self._nothing_after_in(plan.found, closer, opened.node):
                    raise RefusedError("it goes on after it has closed its Session", closer)
                plan.edits.remove(closer)
                plan.handled.add(closer)

    def _nothing_after_in(self, found: Found, closer: cst.CSTNode, within: cst.CSTNode) -> bool:
        inside = set(walk(within))
        return all(is_harmless(found, one) for one in following(found, closer) if one in inside)

    def _try_as_block(self, plan: Plan, opened: Opened, tried: cst.Try, closers: list[cst.BaseStatement]) -> None:
        inside = [one for one in plan.found.closers if one in set(walk(tried))]
        for closer in inside:
            if closer not in closers and not self._nothing_after_in(plan.found, closer, tried):
                raise RefusedError("it goes on after it has closed its Session", closer)
            plan.edits.remove(closer)
            plan.handled.add(closer)
        for statement in [opened.node, *(one for one in plan.found.dropped if one in set(walk(plan.task.node)))]:
            plan.edits.remove(statement)
        name = opened.variable

        def change(node: cst.Try) -> cst.With:
            bare = node.with_changes(leading_lines=[])
            left = without_finally(bare)
            body = [left] if isinstance(left, cst.Try) else list(left.nodes)
            return unit_block(name, ALCHEMY, False, body).with_changes(leading_lines=node.leading_lines)

        plan.edits.add(tried, change)

    def _lines_as_block(self, plan: Plan, opened: Opened, above: cst.CSTNode, closer: cst.BaseStatement) -> None:
        """`db = SessionLocal()`, some lines, `db.close()`."""
        plan.handled.add(closer)
        siblings: list[cst.BaseStatement] = list(getattr(above, "body", ()))
        start, end = siblings.index(opened.node), siblings.index(closer)
        again = {one.node for one in plan.found.opened if one is not opened}
        stop = next((i for i in range(end, len(siblings)) if siblings[i] in again), len(siblings))
        later = [*siblings[end + 1 : stop], *plan.found.dropped]
        if any(node in plan.found.nodes for one in later for node in walk(one)) or plan.found.dropped:
            raise RefusedError("its Session is used after it was closed", closer)
        middle: list[cst.BaseStatement] = []

        def collect(node: cst.BaseStatement) -> object:
            middle.append(node)
            return cst.RemoveFromParent()

        for statement in siblings[start + 1 : end]:
            plan.edits.add(statement, collect)
        plan.edits.remove(opened.node)
        name = opened.variable

        def change(node: cst.BaseStatement) -> cst.With:
            lines = getattr(opened.node, "leading_lines", ())
            return unit_block(name, ALCHEMY, False, middle).with_changes(leading_lines=lines)

        plan.edits.add(closer, change)


def _refuse_passed_on(task: Task) -> None:
    """Refuse a task that is given, with the Session on it, to another function."""
    for call in own(task.node) if task.this is not None else ():
        if isinstance(call, cst.Call) and any(is_name(arg.value, str(task.this)) for arg in call.args):
            if is_name(call.func, "super", "isinstance", "getattr", "type", "repr", "str"):
                continue
            raise RefusedError(f"the task itself is given to {code(call.func)}(), with its Session", call)
