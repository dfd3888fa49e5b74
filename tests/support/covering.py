"""The two sizes of the suite: which tests are in the covering set, and which only the full run has.

The covering set (`make test`) meets each worker pool, strategy, driver, broker and ending, but not each pair of them.
Two rules make it. Tests that take long are listed by name (support/long_tests.py). And of a test with parameters the
covering set has few combinations. Each value of a parameter that says what happens is in one of them. Those that say
where are met by each module: its tests take turns. A contract test counts once for each ending or other case, so each
case meets every worker pool and every strategy.
"""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from support.long_tests import FEWER, FULL_RUN_ONLY

#: Pairs of strategy and worker pool whose workers the covering set starts: those `auto` chooses among them, and
#: prefork, the default of Celery, with every strategy. One pair of each worker pool holds every strategy.
PAIRS = {
    "prefork": ("per_process", "local", "scoped", "per_loop"),
    "threads": ("scoped", "per_loop"),
    "asyncio": ("per_loop", "scoped"),
    "gevent": ("scoped",),
    "eventlet": ("local",),
    "solo": ("per_process", "per_loop"),
}

#: Tells of all tests of the suite, in a run that has collected them: see `listed`.
COLLECTED = pytest.StashKey[Callable[[], list[dict[str, Any]]]]()

#: Parameters that say where a test happens: a module meets each of their values, and no combination of them.
PLACES = frozenset(
    {
        *("strategy", "pool", "worker", "machine", "trials", "storm", "sqlite_host", "library", "pattern"),
        *("driver", "place", "server", "there", "url", "shop", "broker", "broker_url", "make", "kills"),
    }
)

#: Values of these parameters that need what `make test` does not bring along.
OPTIONAL = frozenset({"pymysql", "mysqldb", "rabbitmq"})


@dataclass(frozen=True, slots=True)
class Case:
    """A test as it was collected: what the choice depends on."""

    module: str
    """Path of its file below `tests`, with slashes."""
    name: str
    """Name of its function."""
    parameters: Mapping[str, Any]
    """Values of its parameters, those of fixtures among them."""
    together: Sequence[Sequence[str]] = ()
    """Names of the parameters whose values one `parametrize` gives together."""

    @property
    def function(self) -> str:
        return f"{self.module}::{self.name}"

    @property
    def contract(self) -> bool:
        """Whether it runs on workers that differ in more than one respect at once."""
        return any(hasattr(value, "pool") for value in self.parameters.values())

    def places(self) -> frozenset[Hashable]:
        """Return where it happens: the worker pool, the driver."""
        found: set[Hashable] = set()
        for name, value in self.parameters.items():
            if hasattr(value, "_fields"):
                found.update(zip(value._fields, value, strict=True))
            elif isinstance(value, tuple):
                found.update((name, number, part) for number, part in enumerate(value))
            elif name in PLACES:
                found.add((name, value))
        return frozenset(found)

    def kinds(self) -> frozenset[Hashable]:
        """Return the values of the parameters that say what happens, not where."""
        rest = {n for n, value in self.parameters.items() if not isinstance(value, tuple) and n not in PLACES}
        groups = [*self.together, *((name,) for name in rest - {name for group in self.together for name in group})]
        named = [tuple(name for name in group if name in rest) for group in groups]
        return frozenset((names, *(repr(self.parameters[name]) for name in names)) for names in named if names)

    def words(self) -> set[str]:
        """Return its values as words, those of a NamedTuple or a tuple one by one."""
        values = [part for v in self.parameters.values() for part in (v if isinstance(v, tuple) else (v,))]
        return {value for value in values if isinstance(value, str)} | {repr(kind) for kind in self.kinds()}

    def optional(self) -> bool:
        """Whether it needs a server or a driver that a machine may lack."""
        return bool(OPTIONAL & self.words())

    def worker(self) -> tuple[Hashable, ...]:
        """Return what tells the hosts apart that the tests of a module share; the pairs' workers run in any case."""
        values = [value for value in self.parameters.values() if isinstance(value, tuple)]
        return tuple(value for value in values if not hasattr(value, "strategy"))


def choose(cases: Sequence[Case]) -> list[bool]:
    """Return for each test whether the covering set has it."""
    groups: dict[Hashable, list[int]] = {}
    for number, case in enumerate(cases):
        if not (case.module in FULL_RUN_ONLY or case.function in FULL_RUN_ONLY or left_out(case)):
            groups.setdefault((case.function, case.kinds() if case.contract else None), []).append(number)
    chosen: set[int] = set()
    started: dict[str, set[tuple[Hashable, ...]]] = {}
    met: dict[str, Counter[Hashable]] = {}
    turns: Counter[str] = Counter()
    for members in groups.values():
        module = cases[members[0]].module
        turn, turns[module] = turns[module], turns[module] + 1
        group = {number: cases[number] for number in members}
        picked = cover(turn, group, started.setdefault(module, set()), met.setdefault(module, Counter()))
        started[module].update(cases[number].worker() for number in picked)
        chosen |= picked
    return [number in chosen for number in range(len(cases))]


def cover(
    turn: int, cases: Mapping[int, Case], started: Collection[tuple[Hashable, ...]], met: Counter[Hashable]
) -> set[int]:
    """Pick few that hold each value of each parameter, one at least.

    What needs a server that may be absent comes last: where it is absent, nothing but its own tests is skipped.

    Args:
        turn: Breaks ties.
        started: Workers that run anyway.
        met: How often tests of the module happen where. What it has met is not asked for again, but by a contract
            test; the seldom ones are preferred. Counts what is picked.
    """
    order = [*cases]
    order = order[turn % len(order) :] + order[: turn % len(order)]
    places = {number: case.places() for number, case in cases.items()}
    values = {number: places[number] | case.kinds() for number, case in cases.items()}
    running = {number for number, case in cases.items() if case.worker() in started}
    known = frozenset() if any(case.contract for case in cases.values()) else frozenset(met)
    picked: set[int] = set()
    for numbers in ([number for number in order if not cases[number].optional()], order):
        missing = frozenset().union(*(values[number] for number in numbers)) - known
        missing -= frozenset().union(*(values[number] for number in picked))
        while numbers and (missing or not picked):

            def worth(number: int) -> tuple[int, bool, int]:
                seldom = -max((met[place] for place in places[number]), default=0)
                return len(values[number] & missing), number in running, seldom  # noqa: B023 - called here

            best = max(numbers, key=worth)
            picked.add(best)
            met.update(places[best])
            missing -= values[best]
    return picked


def left_out(case: Case) -> bool:
    """Return whether one of its parameters has a value that the covering set does without."""
    for value in case.parameters.values():
        if hasattr(value, "strategy") and hasattr(value, "pool") and value.strategy not in PAIRS[value.pool]:
            return True
    fewer = {**FEWER.get(case.module, {}), **FEWER.get(case.function, {})}
    return any(name in case.parameters and str(case.parameters[name]) not in kept for name, kept in fewer.items())


def listed(cases: Sequence[Case], covers: Sequence[bool]) -> list[dict[str, Any]]:
    """Return, for the test that guards the covering set, which tests it has."""
    return [
        {"function": case.function, "words": sorted(case.words()), "covered": covered}
        for case, covered in zip(cases, covers, strict=True)
    ]
