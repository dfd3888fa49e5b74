"""What the tasks do: a few workloads, each a pure function of a Session and of the number the task was sent with.

Imports neither the Celery app nor Locust: worker, load generator, checks and report read the same definitions.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from sqlalchemy import func, literal, select
from sqlalchemy.orm import Session

from .models import Account, Entry

ACCOUNTS = 50
"""Few enough that transfers meet at the same rows, enough that the run is not one queue behind the slow ones."""
MAX_AMOUNT = 100
STATEMENTS = 20
WAIT_S = 0.05  # How long the slow workloads wait, on the server or elsewhere, in seconds
CPU_ROUNDS = 48_000  # About 5 ms of Python on the machine this was written on
PREFLIGHT_S = 0.2
TICK_S = 0.01
FEWEST_TICKS = 3  # Of 20. A blocked hub allows one, before or after; a busy machine eats some.
PREFIX = "celery_alchemy.loadtests.tasks.workloads."

Entries = list[tuple[int, int]]


class WrongResult(Exception):
    """A task read something else than what is there, or got another task's row."""


class TransferRefused(Exception):
    """The failure that some transfers are meant to end with, after they have written."""


class HubBlocked(Exception):
    """No other greenlet or thread ran while this one waited for the server."""


class Ending(Enum):
    """How a task ends, once it has done its work."""

    RETURN = auto()  # Committed by what ends the task's transaction
    COMMIT = auto()  # Committed by the task itself, which then returns
    RAISE = auto()  # With `TransferRefused`: nothing of it may stay
    RETRY = auto()  # With a retry, at once; only what the second attempt writes may stay


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt of a task, as its workload sees it."""

    task_id: str  # What it writes into the ledger
    number: int  # What it was sent with, and derives everything from
    attempt: int = 0  # 0, or 1 after a retry
    task: Any = None  # The bound Celery task


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of task."""

    name: str
    summary: str  # One sentence for people
    body: Callable[[Session, Call], object]
    """Does the work; does not end the transaction, unless `Ending.COMMIT` says so."""
    transactions: int  # Transactions of a successful task that wrote; 0: it only reads
    entries: Callable[[int], Entries] = lambda number: []
    endings: tuple[Ending, ...] = (Ending.RETURN,)  # In turn, by the number of the task
    retried_on: tuple[type[Exception], ...] = ()  # `autoretry_for` of the task, with next to no delay
    once: bool = False  # Its effects are to happen once, where the pattern can see to that

    @property
    def task_name(self) -> str:
        """The name the Celery task is sent by, whatever the pattern."""
        return PREFIX + self.name

    def ending(self, number: int) -> Ending:
        """Return how the task with this number ends."""
        return self.endings[number % len(self.endings)]

    def expected_entries(self, number: int) -> Entries:
        """Return the ledger lines `(account_id, amount)` that this task leaves, sorted; none if it is meant to fail."""
        return [] if self.ending(number) is Ending.RAISE else sorted(self.entries(number))

    def expected_error(self, number: int) -> str:
        """Return the class name of the failure this task is meant to end with; empty for a success."""
        return TransferRefused.__name__ if self.ending(number) is Ending.RAISE else ""


def workload(
    summary: str, transactions: int = 0, entries: Callable[[int], Entries] = lambda number: [], **options: Any
) -> Callable[[Callable[[Session, Call], object]], Workload]:
    """Return a decorator that makes a Workload of its body; the name is the function's, without underscores before."""

    def make(body: Callable[[Session, Call], object]) -> Workload:
        return Workload(body.__name__.lstrip("_"), summary, body, transactions, entries, **options)

    return make


def account_of(number: int, offset: int = 0) -> int:
    """Return an account's id: scattered, so that neighbouring numbers do not queue for neighbouring rows."""
    return 1 + (_scatter(number) + offset * 7) % ACCOUNTS


def transfer_of(number: int) -> tuple[int, int, int]:
    """Return two different accounts and the amount that goes from the first to the second."""
    bits = _scatter(number)
    source, distance = bits % ACCOUNTS, 1 + (bits >> 6) % (ACCOUNTS - 1)
    return 1 + source, 1 + (source + distance) % ACCOUNTS, 1 + (bits >> 12) % MAX_AMOUNT


def _scatter(number: int) -> int:
    # Knuth's multiplicative hash, upper bits; `random.Random(number)` would cost more than some workloads.
    return ((number * 2654435761) & 0xFFFFFFFF) >> 8


def _one_entry(number: int) -> Entries:
    return [(account_of(number), 0)]


def _two_entries(number: int) -> Entries:
    source, target, amount = transfer_of(number)
    return [(source, -amount), (target, amount)]


@workload("Touch nothing, not even the Session.")
def _nothing(session: Session, call: Call) -> None:
    pass


@workload("Read one row by its primary key.")
def _select(session: Session, call: Call) -> None:
    _read(session, account_of(call.number))


@workload("Insert one row.", 1, _one_entry)
def _insert(session: Session, call: Call) -> None:
    write_entry(session, call, account_of(call.number))


@workload("Lock two accounts, change both, insert two ledger lines: read-modify-write.", 1, _two_entries)
def _transfer(session: Session, call: Call) -> None:
    source, target, amount = transfer_of(call.number)
    accounts = session.scalars(
        select(Account)
        .where(Account.id.in_((source, target)))
        # One order for all: two opposite transfers that lock in their own order wait for each other for ever.
        .order_by(Account.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).all()
    _expect(sorted((source, target)), [account.id for account in accounts])
    for account in accounts:
        change = amount if account.id == target else -amount
        account.balance += change
        session.add(Entry(transfer_id=call.task_id, account_id=account.id, amount=change))
    session.flush()


@workload(f"{STATEMENTS} small SELECTs and one INSERT in one transaction.", 1, _one_entry)
def _statements(session: Session, call: Call) -> None:
    for offset in range(STATEMENTS):
        _read(session, account_of(call.number, offset))
    write_entry(session, call, account_of(call.number))


@workload("One query that takes the server 50 ms.")
def _slow_query(session: Session, call: Call) -> None:
    sleep_on_server(session, WAIT_S, call.number)


@workload("A SELECT, 50 ms away from the database, an INSERT; all in one transaction.", 1, _one_entry)
def _slow_io(session: Session, call: Call) -> None:
    _read(session, account_of(call.number))
    time.sleep(WAIT_S)
    write_entry(session, call, account_of(call.number))


@workload("About 5 ms of Python, then an INSERT.", 1, _one_entry)
def _cpu(session: Session, call: Call) -> None:
    value = call.number & 0xFFFF
    for _ in range(CPU_ROUNDS):
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF
    write_entry(session, call, account_of(call.number))


MIX = (
    *(Ending.RETURN, Ending.RETRY, Ending.RETURN, Ending.RETURN, Ending.COMMIT),
    *(Ending.RETURN, Ending.RAISE, Ending.RETURN, Ending.RETURN, Ending.RETURN),
)
SLOW_OF_MIX = 9  # The last of ten keeps its two rows locked while the server sleeps


@workload(
    "Transfers; of ten, one commits by itself, one raises after writing, one retries after writing, and one holds "
    "its locks for 50 ms.",
    1,
    _two_entries,
    endings=MIX,
)
def _mix(session: Session, call: Call) -> None:
    _transfer.body(session, call)
    if call.number % len(MIX) == SLOW_OF_MIX:
        sleep_on_server(session, WAIT_S, call.number)
    ending = MIX[call.number % len(MIX)]
    if ending is Ending.COMMIT:
        session.commit()
    elif ending is Ending.RAISE:
        raise TransferRefused(f"{call.number}")
    elif ending is Ending.RETRY and call.attempt == 0:
        raise call.task.retry(countdown=0)


@workload("Fails with HubBlocked if the driver blocks the green hub.")
def _preflight(session: Session, call: Call) -> None:
    """Wait for the server, and count how often another greenlet (or thread, where nothing is patched) ran meanwhile."""
    sleep_on_server(session, 0.0, call.number)  # connecting is not what is measured
    over, ticks = threading.Event(), itertools.count()

    def tick() -> None:
        while not over.wait(TICK_S):
            next(ticks)

    thread = threading.Thread(target=tick, name="preflight", daemon=True)
    thread.start()
    try:
        sleep_on_server(session, PREFLIGHT_S, 0)
        seen = next(ticks)
    finally:
        over.set()
        thread.join()
    if seen < FEWEST_TICKS:
        raise HubBlocked(
            f"While a query took {PREFLIGHT_S * 1000:.0f} ms, another greenlet ran {seen} times instead of about "
            f"{PREFLIGHT_S / TICK_S:.0f}: the driver blocks the hub, so that tasks run one after the other."
        )


def _read(session: Session, account_id: int) -> None:
    found = session.execute(select(Account.id, Account.balance).where(Account.id == account_id)).all()
    _expect([account_id], [row.id for row in found])


def write_entry(session: Session, call: Call, account_id: int) -> None:
    """Insert one line into the ledger."""
    session.add(Entry(transfer_id=call.task_id, account_id=account_id, amount=0))
    session.flush()


def sleep_on_server(session: Session, seconds: float, number: int) -> None:
    """Wait on the server for an answer that belongs to this task alone."""
    sleep = func.pg_sleep if session.get_bind().dialect.name == "postgresql" else func.sleep
    _expect([number], [row[0] for row in session.execute(select(literal(number), sleep(seconds)))])


def _expect(wanted: list[int], found: list[int]) -> None:
    if wanted != found:
        raise WrongResult(f"{found} instead of {wanted}")


_OFFERED = (_nothing, _select, _insert, _transfer, _statements, _slow_query, _slow_io, _cpu, _mix)
WORKLOADS: dict[str, Workload] = {one.name: one for one in _OFFERED}
"""By name; what a benchmark can be asked to run."""
PREFLIGHT = _preflight
NOTHING = _nothing
TASKS = (*_OFFERED, PREFLIGHT)
"""Everything a worker registers."""
