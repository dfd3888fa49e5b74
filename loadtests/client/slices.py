"""Slices of load: on one arm after the other, by users that wait at a gate in between."""

from __future__ import annotations

import gc
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import IO, Any, ClassVar, Self

import gevent
from gevent.event import Event
from locust import User, constant, task
from locust.env import Environment

from ..percentiles import Percentiles, nearest_rank
from ..replies import Outcome
from ..rows import RowWriter, TaskRow
from ..workloads import WORKLOADS, Workload
from .arrivals import ARRIVALS, gaps
from .hub import Pending, ReplyHub, Target
from .outcomes import failure_of, row_of

DRAIN_S = 10.0
DRAIN_STEP_S = 0.1
BACKLOG_S = 120.0
"""The longest wait for a backlog, however steadily it is worked off."""
GATE_S = 1.0
UNBOUNDED_S = 1e9
UNSENT_S = 0.05
BUSY = 0.8
"""A generator that uses more of a CPU than this measures itself."""
LATE = 0.1
"""So does one whose send lag is more than this share of the latency."""


@dataclass(slots=True)
class Arm:
    """A worker that slices are run on."""

    name: str
    hub: ReplyHub
    next_number: int = 0
    """The number of its next task: none is used twice."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a slice command asks for."""

    number: int
    arm: str
    name: str
    """Of the workload, or of somebody else's task."""
    task: str
    workload: Workload | None
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    users: int
    seconds: float | None
    tasks: int | None
    rate_per_s: float | None
    arrival: str
    ramp_s: float
    drain_s: float

    @classmethod
    def parse(cls, command: Mapping[str, Any]) -> Self:
        """Check a command.

        Raises:
            ValueError: It asks for no load, or for two kinds of load.
        """
        name = command.get("task") or command["workload"]
        workload = None if command.get("task") else WORKLOADS[name]
        plan = cls(
            number=command["number"],
            arm=command["arm"],
            name=name,
            task=workload.task_name if workload else name,
            workload=workload,
            args=command.get("args") or (),
            kwargs=command.get("kwargs") or {},
            users=int(command.get("users") or 1),
            seconds=command.get("seconds"),
            tasks=command.get("tasks"),
            rate_per_s=command.get("rate_per_s"),
            arrival=command.get("arrival") or ARRIVALS[0],
            ramp_s=float(command.get("ramp_s") or 0.0),
            drain_s=float(command.get("drain_s") or DRAIN_S),
        )
        if (plan.tasks is None) == (plan.seconds is None):
            raise ValueError("A slice needs either 'seconds' or 'tasks'.")
        if plan.rate_per_s is not None and (plan.seconds is None or plan.rate_per_s <= 0):
            raise ValueError("'rate_per_s' must be positive, and needs 'seconds'.")
        if plan.arrival not in ARRIVALS:
            raise ValueError(f"'arrival' is {plan.arrival!r}. Known: {', '.join(ARRIVALS)}.")
        return plan


@dataclass(slots=True)
class Load:
    """A slice that runs."""

    plan: Plan
    arm: Arm
    begun: float
    claimed: int = 0
    """Tasks sent or about to be."""
    sent: list[tuple[int, Pending]] = field(default_factory=list)
    last_progress: float = 0.0
    stopped: bool = False
    timed_out: bool = False
    error: Exception | None = None
    """What went wrong in the load generator itself."""

    @property
    def low(self) -> float:
        """Begin of the window that is measured."""
        return self.begun + self.plan.ramp_s

    @property
    def high(self) -> float:
        """Its end, and the end of sending."""
        return self.low + (UNBOUNDED_S if self.plan.seconds is None else self.plan.seconds)

    def wanted(self) -> bool:
        """Whether another task is to be sent now."""
        if self.stopped:
            return False
        if self.plan.tasks is not None:
            return self.claimed < self.plan.tasks
        return time.monotonic() < self.high

    def send(self, intended: float | None = None) -> Pending:
        """Send the next task."""
        number = self.arm.next_number
        self.arm.next_number += 1
        self.claimed += 1
        args = self.plan.args if self.plan.workload is None else (number,)
        pending = self.arm.hub.submit(
            self.plan.task, args, self.plan.kwargs, intended=intended, timeout_s=UNBOUNDED_S, on_end=self._progressed
        )
        self.sent.append((number, pending))
        return pending

    def _progressed(self, _: Pending) -> None:
        self.last_progress = time.monotonic()

    def rows(self) -> Iterator[TaskRow]:
        """Yield a row for each task."""
        plan = self.plan
        for number, pending in self.sent:
            yield row_of(pending, workload=plan.name, number=number, arm=plan.arm, slice_number=plan.number)


class SliceUser(User):
    """Waits at the gate; behind it, sends a task, waits for its end, and so on, until the slice is over."""

    wait_time = constant(0)
    idle: ClassVar[list[SliceUser]] = []
    """Those that wait at the gate."""
    returned: ClassVar[Event] = Event()
    """Set by each that comes back."""

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.gate = Event()
        self.load: Load | None = None
        self.delay_s = 0.0
        self.idle.append(self)

    @task
    def serve(self) -> None:
        """One slice."""
        self.gate.wait()
        self.gate.clear()
        load = self.load
        assert load is not None
        try:
            gevent.sleep(self.delay_s)
            while load.wanted():
                pending = load.send()
                pending.wait()
                if pending.error is not None:
                    # Without a broker each send fails at once: do not fill the memory with failures.
                    gevent.sleep(UNSENT_S)
        except Exception as error:
            load.error = error
        self.load = None
        self.idle.append(self)
        self.returned.set()


class Slices:
    """Executes commands; see the generator's protocol."""

    def __init__(self, rows: IO[str]) -> None:
        self._writer = RowWriter(rows)
        self._arms: dict[str, Arm] = {}
        self._runner: Any = Environment(user_classes=[SliceUser]).create_local_runner()
        self._random = random.Random(1)  # noqa: S311 - reproducible, not secret.

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name in list(self._arms):
            self._close(name)
        self._runner.quit()

    def execute(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Execute one command, and return its answer.

        Raises:
            ValueError: It cannot be understood.
        """
        match dict(command):
            case {"open": arm}:
                return self._open(arm)
            case {"slice": slice_}:
                return self._slice(slice_)
            case {"close": {"arm": name}}:
                self._close(name)
                return {"closed": name}
        raise ValueError("The command is none of: open, slice, close.")

    def _open(self, arm: Mapping[str, Any]) -> dict[str, Any]:
        if arm["arm"] in self._arms:
            raise ValueError(f"The arm {arm['arm']!r} is open already.")
        target = Target(arm["broker_url"], arm["queue"], arm["reply_url"])
        self._arms[arm["arm"]] = Arm(arm["arm"], ReplyHub(target))
        # What was imported stays: collections during a slice need not look through it.
        gc.collect()
        gc.freeze()
        return {"opened": arm["arm"]}

    def _close(self, name: str) -> None:
        self._arms.pop(name).hub.close()

    def _slice(self, command: Mapping[str, Any]) -> dict[str, Any]:
        plan, cpu = Plan.parse(command), time.process_time()
        arm = self._arms[plan.arm]
        arm.next_number = max(arm.next_number, int(command.get("first_number") or 0))
        users = [] if plan.rate_per_s else self._users(plan.users)
        strangers = arm.hub.strangers
        gc.collect()
        load = Load(plan, arm, time.monotonic())
        load.last_progress = load.begun
        if plan.rate_per_s:
            self._arrive(load)
        else:
            self._run_users(load, users)
        load.timed_out |= not self._drain(load)
        load.timed_out |= not self._gather(users, plan.drain_s)
        if load.error is not None:
            raise load.error
        rows = list(load.rows())
        self._writer.write(rows)
        arm.hub.forget()
        cpu_s, wall_s = time.process_time() - cpu, time.monotonic() - load.begun
        answer = _answer(load, rows)
        late = answer["latency_ms"] and answer["send_lag_p99_ms"] > LATE * answer["latency_ms"]["p50"]
        return {
            **answer,
            "strangers": arm.hub.strangers - strangers,
            "cpu_s": round(cpu_s, 4),
            "generator_bound": bool(late or cpu_s > BUSY * wall_s),
        }

    def _users(self, count: int) -> list[SliceUser]:
        idle = SliceUser.idle
        if len(idle) < count:
            self._runner.spawn_users({SliceUser.__name__: count - len(idle)})
        taken, idle[:] = idle[:count], idle[count:]
        return list(taken)

    def _gather(self, users: Sequence[SliceUser], within_s: float) -> bool:
        """Wait until all users are at the gate again; return whether they are."""
        deadline = time.monotonic() + within_s
        # One that was about to send when the slice ended notices it now.
        while any(user.load is not None for user in users):
            if time.monotonic() > deadline:
                return False
            SliceUser.returned.clear()
            SliceUser.returned.wait(GATE_S)
        return True

    def _run_users(self, load: Load, users: Sequence[SliceUser]) -> None:
        for position, user in enumerate(users):
            user.load, user.delay_s = load, load.plan.ramp_s * position / len(users)
            user.gate.set()
        if load.plan.tasks is None:
            gevent.sleep(max(0.0, load.high - time.monotonic()))
        else:
            while load.wanted():
                gevent.sleep(0.005)
                if time.monotonic() > load.last_progress + load.plan.drain_s:
                    # Nothing is answered any more: to go on would only wait, user by user.
                    load.timed_out = True
                    break
        load.stopped = True

    def _arrive(self, load: Load) -> None:
        plan = load.plan
        assert plan.rate_per_s is not None
        intended = load.begun
        for gap in gaps(plan.rate_per_s, plan.arrival, self._random):
            intended += gap
            if intended >= load.high:
                break
            gevent.sleep(max(0.0, intended - time.monotonic()))
            load.send(intended)
        gevent.sleep(max(0.0, load.high - time.monotonic()))

    def _drain(self, load: Load) -> bool:
        """Wait for what is in flight while replies come: a backlog takes its time, a worker that hangs answers none."""
        limit = time.monotonic() + BACKLOG_S
        if not load.timed_out:
            load.last_progress = time.monotonic()
        while not (drained := load.arm.hub.drain(DRAIN_STEP_S)):
            if time.monotonic() > min(limit, load.last_progress + load.plan.drain_s):
                break
        load.arm.hub.give_up([pending for _, pending in load.sent])
        return drained


def _answer(load: Load, rows: Sequence[TaskRow]) -> dict[str, Any]:
    """Return the summary of a slice.

    Closed: of the tasks that ended within the window. Open: `succeeded` likewise, but latencies of those that should
    have been sent within the window, whenever they ended: else a stall at its end would be left out. A task that
    failed as it was meant to counts as succeeded, though not in the latencies.
    """
    plan = load.plan
    low, high = load.low, load.high
    if plan.tasks is not None:
        low = min((row.sent for row in rows), default=load.begun)
        high = max((row.ended for row in rows), default=load.begun)
    failures = [(row, failure_of(row, plan.workload)) for row in rows]
    answered = [(row, wrong) for row, wrong in failures if row.finals]
    last = math.inf if plan.tasks is not None else high
    well = [row for row, wrong in answered if wrong is None and low <= row.ended < last]
    measured = [
        row.latency_ms
        for row, wrong in answered
        if wrong is None
        and row.outcome == Outcome.SUCCESS
        and low <= (row.intended if plan.rate_per_s else row.ended) < last
    ]
    lags = sorted(row.send_lag_ms for row in rows)
    reply_lags = sorted(
        (pending.received - row.ended) * 1000 for (_, pending), row in zip(load.sent, rows, strict=True)
    )
    failed = [row for row, wrong in answered if wrong is not None]
    return {
        "slice": plan.number,
        "window": [low, high],
        "tasks": len(rows),
        "succeeded": len(well),
        "failed": len(failed),
        "unanswered": len(rows) - len(answered),
        "errors": dict(Counter(row.error_type or "WrongEnding" for row in failed)),
        "latency_ms": asdict(found) if (found := Percentiles.of(measured)) else None,
        "send_lag_p99_ms": round(nearest_rank(lags, 99), 3) if lags else 0.0,
        "reply_lag_p99_ms": round(nearest_rank(reply_lags, 99), 3) if reply_lags else 0.0,
        "timed_out": load.timed_out,
    }
