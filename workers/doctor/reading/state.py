"""What may have happened on the ways to a line: what names stand for, and what each Session has gone through."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, replace
from typing import Any

from .project import Module
from .values import UNKNOWN, Value, literal

Place = tuple[Module, ast.AST]


@dataclass(frozen=True, slots=True)
class Use:
    """What a Session (or an Engine that a task makes) may have gone through."""

    value: Value
    made: Place | None = None
    """Where this code has made it; None for one that was given, and for proxies."""
    writes: frozenset[Place] = frozenset()
    """Not committed."""
    open: Place | None = None
    """The first statement of its transaction."""
    slow: Place | None = None
    """Slow work while the transaction was open."""
    risk: Place | None = None
    """A statement that may fail, since the last `try`."""
    broken: Place | None = None
    """The handler that caught its failure, and did not roll back."""
    quiet: bool = False
    """That handler tells no caller."""
    unclosed: bool = False
    touched: bool = False
    lost: frozenset[Place] = frozenset()
    """Writes that a close without a commit has thrown away."""
    committed: bool = False
    escaped: bool = False
    """Returned, or kept by something that lives longer."""

    def or_else(self, other: Use) -> Use:
        """Return what may have happened on one way or the other."""
        if self == other:
            return self
        return replace(
            self,
            made=self.made or other.made,
            writes=self.writes | other.writes,
            open=self.open or other.open,
            slow=self.slow or other.slow,
            risk=self.risk or other.risk,
            broken=self.broken or other.broken,
            quiet=self.quiet or other.quiet,
            unclosed=self.unclosed or other.unclosed,
            touched=self.touched or other.touched,
            lost=self.lost | other.lost,
            committed=self.committed or other.committed,
            escaped=self.escaped or other.escaped,
        )

    def ended(self, **changed: Any) -> Use:
        """Return it without a transaction."""
        return replace(self, writes=frozenset(), open=None, slow=None, risk=None, broken=None, quiet=False, **changed)


@dataclass(slots=True)
class State:
    """One line's past."""

    env: dict[str, Value]
    outer: tuple[dict[str, Value], ...] = ()
    """The names of enclosing functions."""
    sessions: dict[Any, Use] = field(default_factory=dict)
    dead: bool = False
    """Nothing comes after it: what was called always raises."""

    def copy(self) -> State:
        return type(self)(dict(self.env), self.outer, dict(self.sessions), self.dead)

    def use(self, session: Value) -> Use:
        """Return what a Session has gone through."""
        return self.sessions.get(session.key) or Use(session)

    def put(self, use: Use) -> None:
        self.sessions[use.value.key] = use

    def change(self, session: Value, **changed: Any) -> Use:
        """Change what a Session has gone through."""
        use = replace(self.use(session), **changed)
        self.put(use)
        return use


class ClassState(State):
    """A line in the body of a class, whose names its methods do not see."""

    __slots__ = ()


def join(*states: State | None) -> State | None:
    """Return what may have happened on any of the ways that go on; None where there is none."""
    going = [state for state in states if state is not None and not state.dead]
    if not going:
        return None
    first = going[0].copy()
    for other in going[1:]:
        join_sessions(first, other)
        for name, value in other.env.items():
            first.env[name] = _either(first.env.get(name), value)
    return first


def _either(one: Value | None, other: Value) -> Value:
    """Return what a name may stand for that was given two values: of a Session and None, the Session; of two Sessions,
    one that knows of the other."""
    if one is None or one is other:
        return other
    if one.kind == "constant":
        if other.kind == "constant":
            return one if literal(one) == literal(other) else UNKNOWN
        return other
    if one.is_session and other.is_session and one.key != other.key:
        known = one.parts.get("also", ())
        return one if any(value.key == other.key for value in known) else one.but(also=(*known, other))
    return other if one.name == "?" and other.kind != "constant" else one


def join_sessions(state: State, other: State) -> None:
    """Let `state` have what may have happened in `other` too."""
    for key, use in other.sessions.items():
        known = state.sessions.get(key)
        state.sessions[key] = use if known is None else known.or_else(use)


@dataclass(slots=True)
class Raised:
    """What may have happened when something raises."""

    state: State | None = None

    def add(self, state: State | None) -> None:
        """One more place that may raise."""
        if state is None:
            return
        if self.state is None:
            self.state = state.copy()
            self.state.dead = False
        else:
            join_sessions(self.state, state)
            for name, value in state.env.items():
                self.state.env[name] = _either(self.state.env.get(name), value)


@dataclass(slots=True)
class Frame:
    """A function, or a module, that is being read."""

    module: Module
    function: Value | None = None
    raised: Raised = field(default_factory=Raised)
    returns: list[tuple[State, Value | None]] = field(default_factory=list)
    breaks: list[State] = field(default_factory=list)
    continues: list[State] = field(default_factory=list)
    yields: Any = None
    """What to do where a context manager written as a generator yields."""
    globals: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is run: a module at its import, a task, a hook or signal, or any other function."""

    kind: str
    """import, task, hook, late (after the result is stored), process_init, function."""
    name: str = ""
    node: ast.AST | None = None
    task: Value | None = None
    ours: bool = False
    """A task, or a class of tasks, of celery-alchemy."""
    commits: bool = False
    """Its Session commits when it returns."""
    signal: str = ""
    """The signal that calls it; empty for a hook of a task class."""


@dataclass(slots=True)
class Event:
    """Something that a rule wants to know of."""

    kind: str
    module: Module
    node: ast.AST
    state: State
    entry: Entry
    value: Value | None = None
    info: dict[str, Any] = field(default_factory=dict)
