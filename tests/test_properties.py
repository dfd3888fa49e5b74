"""Any nesting of calls, eager tasks, units of work and savepoints stores what a model of the contract predicts."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from celery import Task
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import QueuePool
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from support.apps import make_app
from support.databases import PostgreSQL, assert_not_busy
from support.definitions import Refused
from support.project.models import Row, User

from celery_alchemy import DatabaseTask, NoUnitOfWork

EXAMPLES = 60
APPLICATION = "properties"


@dataclass(frozen=True)
class Step:
    """One thing that the code of a task does.

    kind: `add` a row, `flush`, `commit`, `rollback`, `callback` (a row and an on_commit), or a block of `steps`:
    `savepoint`, `call` (a task like a function), `apply` (a task eagerly), `unit` (of work).
    ending: of a block, `ok`, `fail` (the caller catches it), `integrity` (fails by a database error), `discard`
    (commit_on_success=False).
    """

    kind: str
    steps: tuple[Step, ...] = ()
    ending: str = "ok"


def blocks(commits: bool, depth: int) -> st.SearchStrategy[tuple[Step, ...]]:
    """Generate the steps of a block; `commits`: it may commit and roll back, for no savepoint is open around it."""
    plain = ["add", "add", "flush", "callback", *(["commit", "rollback"] if commits else [])]
    step = st.sampled_from(plain).map(Step)
    if depth:
        same, own = blocks(commits, depth - 1), blocks(True, depth - 1)
        step |= st.builds(
            Step, st.just("savepoint"), blocks(False, depth - 1), st.sampled_from(["ok", "fail", "integrity"])
        )
        step |= st.builds(Step, st.just("call"), same, st.sampled_from(["ok", "fail"]))
        step |= st.builds(Step, st.just("apply"), own, st.sampled_from(["ok", "fail", "discard"]))
        step |= st.builds(Step, st.just("unit"), own, st.sampled_from(["ok", "fail"]))
    return st.lists(step, max_size=5).map(tuple)


@dataclass
class World:
    """What can be seen from outside: the rows that were committed, the callbacks that ran."""

    rows: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)


class Model:
    """A unit of work as the contract describes it: layers of rows and callbacks, one more per open savepoint."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.layers: list[World] = [World()]

    def run(self, steps: tuple[Step, ...], path: str) -> None:
        for number, step in enumerate(steps):
            self.step(step, f"{path}.{number}")

    def step(self, step: Step, path: str) -> None:
        match step.kind:
            case "add":
                self.layers[-1].rows.append(path)
            case "callback":
                self.layers[-1].rows.append(path)
                self.layers[-1].ran.append(path)
            case "commit":
                self.commit()
            case "rollback":
                self.layers = [World()]
            case "savepoint":
                self.layers.append(World())
                self.run(step.steps, path)
                inner = self.layers.pop()
                if step.ending == "ok":
                    self.layers[-1].rows += inner.rows
                    self.layers[-1].ran += inner.ran
            case "call":
                self.run(step.steps, path)
            case "apply" | "unit":
                own = Model(self.world)
                own.run(step.steps, path)
                if step.ending == "ok":
                    own.commit()

    def commit(self) -> None:
        (layer,) = self.layers
        self.world.rows += layer.rows
        self.world.ran += layer.ran
        self.layers = [World()]


class Machine:
    """The same, done by the library: every block is a task, a unit of work or a savepoint."""

    def __init__(self, url: str, strategy: str) -> None:
        app, self.db = make_app(url)
        app.conf.alchemy_session_strategy = strategy
        self.key = ""
        self.ran: list[str] = []
        machine = self

        def program(self: Task, steps: tuple[Step, ...], path: str, ending: str) -> None:
            machine.run(self.db, steps, path)
            if ending == "retry" and self.request.retries == 0:
                raise self.retry(countdown=0)
            if ending == "fail":
                raise Refused

        self.task = app.task(base=DatabaseTask, bind=True, name="program")(program)
        self.discarding = app.task(base=DatabaseTask, bind=True, name="discards", commit_on_success=False)(program)

    def run(self, session: Session, steps: tuple[Step, ...], path: str) -> None:
        for number, step in enumerate(steps):
            assert self.db.session() is session
            self.step(session, step, f"{path}.{number}")
        assert self.db.session() is session

    def step(self, session: Session, step: Step, path: str) -> None:
        match step.kind:
            case "add":
                session.add(Row(key=self.key, note=path))
            case "callback":
                session.add(Row(key=self.key, note=path))
                self.db.on_commit(lambda: self.ran.append(path))
            case "flush" | "commit" | "rollback":
                getattr(session, step.kind)()
            case "savepoint":
                with contextlib.suppress(Refused, IntegrityError), session.begin_nested():
                    self.run(session, step.steps, path)
                    if step.ending == "integrity":
                        session.add(User(name="taken"))
                        session.flush()
                    if step.ending == "fail":
                        raise Refused
            case "call":
                with contextlib.suppress(Refused):
                    self.task(step.steps, path, step.ending)
            case "apply":
                task = self.discarding if step.ending == "discard" else self.task
                result = task.apply(args=(step.steps, path, step.ending))
                assert result.successful() or isinstance(result.result, Refused), result.traceback
            case "unit":
                with contextlib.suppress(Refused), self.db.unit_of_work() as inner:
                    self.run(inner, step.steps, path)
                    if step.ending == "fail":
                        raise Refused


@pytest.fixture(scope="module", params=["local", "scoped", "per_process"])
def machine(request: pytest.FixtureRequest, database: PostgreSQL) -> Iterator[Machine]:
    if not database.column("SELECT 1 FROM users WHERE name = 'taken'"):
        database.execute("INSERT INTO users (name) VALUES ('taken')")
    machine = Machine(database.url(APPLICATION), request.param)
    yield machine
    machine.db.dispose()


@settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(steps=blocks(True, depth=3), ending=st.sampled_from(["ok", "fail", "retry"]))
def test_rows_and_callbacks_are_what_the_model_predicts(
    machine: Machine, database: PostgreSQL, steps: tuple[Step, ...], ending: str
) -> None:
    """And nothing is left: no connection checked out, no unit of work open."""
    machine.key, machine.ran = uuid.uuid4().hex, []
    world = World()
    for attempt in range(2 if ending == "retry" else 1):
        model = Model(world)
        model.run(steps, "")
        if ending == "ok" or attempt == 1:
            model.commit()

    result = machine.task.apply(args=(steps, "", ending))

    assert result.successful() or isinstance(result.result, Refused) or ending == "retry", result.traceback
    assert sorted(database.rows(machine.key)) == sorted(world.rows)
    assert machine.ran == world.ran
    assert_not_busy(database, APPLICATION)
    connection_pool = machine.db.engine.pool
    if isinstance(connection_pool, QueuePool):  # per_process keeps no connections outside a worker
        assert connection_pool.checkedout() == 0
    with pytest.raises(NoUnitOfWork):
        machine.db.session.connection()


def test_the_generated_programs_reach_everything(machine: Machine) -> None:
    """The property would say nothing if generation never nested."""
    seen: set[tuple[str, str, str]] = set()

    def walk(steps: tuple[Step, ...], around: str) -> None:
        for step in steps:
            seen.add((around, step.kind, step.ending))
            walk(step.steps, step.kind)

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
    @given(blocks(True, depth=3))
    def collect(steps: tuple[Step, ...]) -> None:
        walk(steps, "task")

    collect()
    for outer in ("savepoint", "call", "apply", "unit"):
        for inner in ("savepoint", "call", "apply", "unit", "add", "callback"):
            assert any(s[:2] == (outer, inner) for s in seen), (outer, inner)
